"""Read one T1w image, or say precisely why it cannot be used; choose which affine of its header to believe.

Nothing in a file is believed: sizes are checked before anything is allocated, and no more is read than the header
claims and the file can hold.
"""

from __future__ import annotations

import gzip
import logging
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling
from scipy.linalg import polar

from bids_varaug.errors import ScanError
from bids_varaug.images.intensity import MAX_SPIKE_SHARE, spike_share, standardise
from bids_varaug.machine import GIB, memory_bound

SAME_SIZE = 0.01  # relative difference of voxel sizes up to which the parts of a header agree
SAME_ANGLE = 3.0  # degrees between the axes of sform and qform up to which they agree
OBLIQUE = 5.0  # degrees between an axis of the image and of the scanner, beyond which the image is oblique

_TEMPLATES = {3: "Talairach", 4: "MNI152", 5: "another template"}
_MM_PER_UNIT = {1: ("metre", 1e3), 3: ("micron", 1e-3)}  # of xyzt_units; all others: mm
_CORRECT = "Correct the header (fslorient, nibabel, dcm2niix)"
_FIX = f"{_CORRECT}, or choose with --trust sform|qform."


def voxel_volume(affine: np.ndarray) -> float:
    """Return the volume of a voxel, mm3: the determinant, which a shear makes smaller than a box.

    >>> voxel_volume(np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1.0]]))
    2.0
    """
    return abs(float(np.linalg.det(affine[:3, :3])))


def is_oblique(affine: np.ndarray) -> bool:
    """Whether an axis lies more than `OBLIQUE` degrees off every axis of the scanner."""
    cosines = np.abs(affine[:3, :3] / voxel_sizes(affine)).max(axis=0)
    return bool(cosines.min() < np.cos(np.deg2rad(OBLIQUE)))


def in_mm(sizes: np.ndarray, form: str = ".4g") -> str:
    """Format sizes along the axes for a message.

    >>> in_mm(np.array([1, 1, 1.25]))
    '1 x 1 x 1.25 mm'
    """
    return f"{' x '.join(format(float(size), form) for size in sizes)} mm"


def choose_affine(name: str, header: nib.Nifti1Header, trust: str | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Choose between sform, qform and pixdim, and tell where they contradict each other.

    Where both forms are set and agree, the sform counts, as the NIfTI standard has it. Where they differ in voxel size
    or axes, a form in scanner space takes precedence over one in a template's; of two of the same kind the qform, which
    has the sizes of pixdim, if the sizes differ, else the sform. A lone sform of other sizes than pixdim keeps its axes
    and takes the sizes of pixdim (but where these are all 1, as in a header that nobody filled in).

    Returns the affine, (4, 4) float64, voxel -> mm, RAS+ world, and warnings. `trust` is "sform" or "qform" to take
    that one where both are set, or none is; `name` is that of the file, for messages. Raises `ScanError` if no form
    says where left and right are, or the two contradict each other in it.
    """
    codes = {form: int(header[f"{form}_code"]) for form in ("sform", "qform")}
    given = [form for form, code in codes.items() if code > 0] or ([trust] if trust else [])
    if not given:
        cause = "no orientation (qform_code and sform_code are 0 or unknown)"
        raise ScanError(f"{name}: {cause}, so left and right cannot be told apart. {_FIX}")
    if trust in given:
        given = [trust]
    unit, mm = _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, ("", 1.0))
    forms = {form: affine for form in given if (affine := _form(header, form, mm)) is not None}
    if not forms:
        damaged = f"the affine has NaN or infinite values, or is singular ({', '.join(given)})"
        raise ScanError(f"{name}: {damaged}. {_CORRECT}.")
    chosen, warnings = _choose_form(name, forms, codes) if len(forms) == 2 else (next(iter(forms)), [])
    if len(forms) < len(given):
        warnings.append(f"Only the {chosen} of the header can be used; the other is damaged.")
    affine, template = forms[chosen], _TEMPLATES.get(codes[chosen])
    sizes, pixdim = voxel_sizes(affine), mm * np.abs(header["pixdim"][1:4])
    has_pixdim = np.isfinite(pixdim).all() and pixdim.all()
    if given != [trust] and len(forms) == 1 and has_pixdim and not _same_sizes(sizes, pixdim):
        used = f"{chosen} was"
        if (pixdim != mm).any() or template:  # 1 is what a header has that nobody filled in
            affine[:3, :3] = polar(affine[:3, :3])[0] * pixdim
            used = "sizes of pixdim were"
        forms_sizes = f"{chosen} with voxels of {in_mm(sizes)}, pixdim of {in_mm(pixdim)}"
        warnings.append(f"The header contradicts itself: {forms_sizes}. The {used} used. {_FIX}")
    if template:
        warnings.append(
            f"The header says that the image is in the space of a template (code {codes[chosen]}: {template}). If so, "
            "volumes are those in that space, not the person's."
        )
    if unit:
        warnings.append(f"The header gives lengths in {unit}s; they were converted.")
    return affine, tuple(warnings)


def _choose_form(name: str, forms: Mapping[str, np.ndarray], codes: Mapping[str, int]) -> tuple[str, list[str]]:
    sform, qform = (polar(form[:3, :3])[0] for form in forms.values())
    if np.linalg.det(sform) * np.linalg.det(qform) < 0:
        mirrored = "sform and qform are mirror images of each other"
        raise ScanError(f"{name}: {mirrored}, so left and right cannot be told apart. {_FIX}")
    angle = np.rad2deg(np.arccos(np.clip((np.trace(sform.T @ qform) - 1) / 2, -1, 1)))
    same_sizes = _same_sizes(*map(voxel_sizes, forms.values()))
    if same_sizes and angle <= SAME_ANGLE:
        return "sform", []
    in_template = [codes[form] in _TEMPLATES for form in forms]
    qform_first = in_template[0] if in_template[0] != in_template[1] else not same_sizes
    chosen = "qform" if qform_first else "sform"
    apart = f", {angle:.0f} degrees apart" if angle > SAME_ANGLE else ""
    parts = [f"{f} (code {codes[f]}) with voxels of {in_mm(voxel_sizes(forms[f]))}" for f in forms]
    return chosen, [f"The header contradicts itself: {' and '.join(parts)}{apart}. The {chosen} was used. {_FIX}"]


def _form(header: nib.Nifti1Header, form: str, mm: float) -> np.ndarray | None:
    """One form in mm; None where it is no affine."""
    try:
        with np.errstate(all="ignore"):
            affine = np.array(getattr(header, f"get_{form}")(), np.float64)
    except (ValueError, nib.spatialimages.HeaderDataError):
        return None
    affine[:3] *= mm
    usable = np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 0
    return affine if usable else None


def _same_sizes(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((np.abs(a / b - 1) <= SAME_SIZE).all())


MAX_VOXELS = 400_000_000  # more voxels than a head of 220 mm has at 0.3 mm; 1.6 GB as float32
BYTES_PER_VOXEL = 16  # most memory that reading and conforming take: four float32 copies at once
VOXEL_SIZE_RANGE = (0.3, 5.0)  # mm. Structures are a few mm thick: larger voxels do not show them
FIELD_OF_VIEW_RANGE = (70.0, 600.0)
"""mm along each axis. Below, the brain cannot be whole; above, it is no image of a head."""
MIN_SQUARENESS = 0.5  # |determinant| of the unit voxel axes: 1 for right angles, 0.87 for a gantry tilt of 30 deg

_QUIET = logging.Logger("nibabel header checks", level=logging.CRITICAL + 1)
# DEFLATE cannot compress by more than 1032:1, so a .gz bounds what it can hold.
_MAX_GZIP_RATIO = 1032
_MAX_TRAILING_BYTES = 1 << 26
_CANNOT_READ = (HeaderDataError, ImageFileError, EOFError, zlib.error, OSError, OverflowError, ValueError, MemoryError)
_AGAIN = "Fetch or convert it again."


@dataclass(frozen=True)
class Volume:
    """One image volume."""

    data: np.ndarray  # (X, Y, Z) float32
    affine: np.ndarray  # (4, 4) float64, voxel index -> mm, RAS+ world
    warnings: tuple[str, ...] = ()  # where the header was not taken at its word


@dataclass(frozen=True)
class StoredVolume:
    """One image volume as its file has it."""

    name: str
    data: np.ndarray  # (X, Y, Z), values and type as stored
    slope: float | None
    intercept: float | None
    affine: np.ndarray  # as of `Volume`
    sizes: np.ndarray  # (3,) float32, of the voxels, mm; the header's, unless the affine contradicts them
    warnings: tuple[str, ...]

    @property
    def values(self) -> np.ndarray:
        """What the stored numbers stand for; of the type stored where nothing scales them."""
        return apply_read_scaling(self.data, self.slope, self.intercept)


def load_t1w(path: Path, trust: str | None = None) -> Volume:
    """Read a T1w image from ``.nii`` or ``.nii.gz``; intensities are as `standardise` leaves them.

    `trust` is as in `choose_affine`. Raises `ScanError`, which names the file, if it is absent, empty, damaged or not
    NIfTI; is not one 3D volume of real numbers; has NaN, infinite or only equal values, or values that wrapped around;
    does not say where left and right are; is too large for the memory; or its voxels or field of view cannot be those
    of a head.
    """
    return standardise_volume(read_t1w(path, trust))


def standardise_volume(stored: StoredVolume) -> Volume:
    """Bring intensities to one scale; a `ScanError` where values wrapped around."""
    # Slope and intercept would only round what `standardise` undoes.
    data = standardise(stored.data, negative=(stored.slope or 1) < 0)
    _check_continuity(stored.name, data, stored.data)
    return Volume(data, stored.affine, stored.warnings)


def read_t1w(path: Path, trust: str | None = None) -> StoredVolume:
    """Read a T1w image as it is stored; arguments and errors, but for values that wrapped, are those of `load_t1w`."""
    path = Path(path)
    try:
        with _open(path) as stream:
            header = _read_header(path.name, stream)
            shape = _check_shape(path.name, header)
            affine, warnings = choose_affine(path.name, header, trust)
            _check_affine(path.name, affine, shape)
            slope, intercept = header.get_slope_inter()  # raises where they are not finite
            raw = _read_data(path, stream, header, shape)
    except _CANNOT_READ as error:
        reason = f"{type(error).__name__}: {error}"
        raise ScanError(f"{path.name}: cannot be read ({reason}). The file is damaged. {_AGAIN}") from error
    bad = raw.size - int(np.count_nonzero(np.isfinite(raw)))
    _refuse(path.name, {
        f"{bad:,} of {raw.size:,} voxels are NaN or infinite. Replace them (by 0 outside the head).":
            bad > 0,
        f"every voxel is {raw.flat[0]:g}; the image is empty. {_AGAIN}":
            raw.min() == raw.max(),
    })  # fmt: skip
    _, mm = _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, ("", 1.0))
    sizes, of_affine = (header["pixdim"][1:4] * mm).astype(np.float32), voxel_sizes(affine).astype(np.float32)
    sizes = sizes if (sizes > 0).all() and _same_sizes(sizes, of_affine) else of_affine
    return StoredVolume(path.name, raw, slope, intercept, affine, sizes, warnings)


def _refuse(name: str, faults: Mapping[str, bool]) -> None:
    """Raise a ScanError with the first fault that holds."""
    for fault, holds in faults.items():
        if holds:
            raise ScanError(f"{name}: {fault}")


def _open(path: Path) -> BufferedIOBase:
    _refuse(path.name, {
        f"a link to content that is not here. Get it with `datalad get {path}`.":
            path.is_symlink() and not path.exists(),
        f"no such file ({path}).": not path.is_file(),
        "not named .nii or .nii.gz. Convert it to NIfTI.": not path.name.lower().endswith((".nii", ".nii.gz")),
        f"the file is empty (0 bytes). {_AGAIN}": path.is_file() and path.stat().st_size == 0,
    })  # fmt: skip
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _read_header(name: str, stream: BufferedIOBase) -> nib.Nifti1Header:
    # Extensions are not read: their sizes are one more thing that a damaged file can lie about.
    block = _read_exactly(name, stream, nib.Nifti1Header.sizeof_hdr)
    kind = nib.Nifti2Header if block[4:7] == nib.Nifti2Header.single_magic else nib.Nifti1Header
    header = kind(block + _read_exactly(name, stream, kind.sizeof_hdr - len(block)), check=False)
    if header["magic"] != kind.single_magic:
        what = "not a NIfTI image with header and data in one file, but text, Analyze or half a NIfTI pair"
        raise ScanError(f"{name}: {what}. Fetch it again, or convert it to .nii.gz.")
    # nibabel would log what it corrects (it does no harm) beside what it raises (we say it).
    sizes = header["pixdim"][1:4].copy()
    header.check_fix(logger=_QUIET, error_level=40)
    header["pixdim"][1:4] = np.abs(sizes)  # a size of 0 is no size, and not 1
    offset = float(header["vox_offset"])
    if not kind.sizeof_hdr + 4 <= offset < 2**30:
        raise ScanError(f"{name}: the data cannot start at byte {offset:g}, as the header says. {_AGAIN}")
    return header


def _check_shape(name: str, header: nib.Nifti1Header) -> tuple[int, ...]:
    shape = tuple(int(n) for n in header.get_data_shape())
    text = " x ".join(map(str, shape))
    dtype = header.get_data_dtype()
    is_real = dtype.fields is None and dtype.kind in "iuf" and dtype.itemsize <= 8
    need, bound = BYTES_PER_VOXEL * math.prod(shape) / GIB, memory_bound()
    _refuse(name, {
        f"impossible shape ({text}). {_AGAIN}": any(n < 1 for n in shape),
        f"{len(shape)}D image ({text}). A T1w must be one volume; split it.": math.prod(shape[3:]) > 1,
        f"the header claims {text} voxels, more than {MAX_VOXELS:,}. If the file is not damaged, crop the image to the "
        "head or resample it to 0.5 mm or coarser.": math.prod(shape) > MAX_VOXELS,
        f"voxels of type {header.get_value_label('datatype')}. A T1w must hold one real number per voxel; convert it "
        "to int16 or float32.": not is_real,
        f"{text} voxels need about {need:.1f} GB of memory, and {bound.free:.1f} GB of {bound.total:.1f} are free "
        f"({bound.source}). Give more memory, run fewer steps at once (--nprocs), or resample the image.":
            need > bound.free,  # the kernel would kill us
    })  # fmt: skip
    return (*shape, 1, 1, 1)[:3]


def _check_affine(name: str, affine: np.ndarray, shape: tuple[int, ...]) -> None:
    fix = "If the header is wrong, correct it (fslorient, nibabel, dcm2niix); otherwise"
    sizes = voxel_sizes(affine)
    extent = sizes * shape
    finest, coarsest = VOXEL_SIZE_RANGE
    smallest, largest = FIELD_OF_VIEW_RANGE
    _refuse(name, {
        f"the affine is strongly sheared or has absurd values. {fix} resample the image.":
            voxel_volume(affine) < MIN_SQUARENESS * sizes.prod() or np.abs(affine).max() > 1e6,
        f"voxels of {in_mm(sizes, '.3g')}; {finest:g} to {coarsest:g} mm can be segmented. {fix} resample the "
        "image. The unit of length counts too (xyzt_units).":
            sizes.min() < finest * 0.99 or sizes.max() > coarsest * 1.01,
        f"field of view of {in_mm(extent, '.0f')}; that of a whole head is {smallest:g} to {largest:g} mm along each "
        f"axis. {fix} {'crop the image' if extent.min() >= smallest else 'use an image of the whole brain'}.":
            extent.min() < smallest or extent.max() > largest,
    })  # fmt: skip


def _read_data(path: Path, stream: BufferedIOBase, header: nib.Nifti1Header, shape: tuple[int, ...]) -> np.ndarray:
    """Values as stored."""
    dtype = header.get_data_dtype()
    n_bytes, on_disk = math.prod(shape) * dtype.itemsize, path.stat().st_size
    if n_bytes > on_disk * (_MAX_GZIP_RATIO if isinstance(stream, gzip.GzipFile) else 1):
        claim = f"the header claims {n_bytes:,} bytes of data, more than the file of {on_disk:,} bytes can hold"
        raise ScanError(f"{path.name}: {claim}. It is truncated or damaged. {_AGAIN}")
    stream.seek(int(header["vox_offset"]))
    block = _read_exactly(path.name, stream, n_bytes)
    # Reading on to the end makes gzip compare its checksum; bounded, for data that never end.
    stream.read(_MAX_TRAILING_BYTES)
    stored = np.frombuffer(block, dtype).reshape(shape, order="F")
    return np.array(stored, dtype.newbyteorder("="), order="C")


def _check_continuity(name: str, data: np.ndarray, raw: np.ndarray) -> None:
    share, limit = spike_share(data), MAX_SPIKE_SHARE
    if raw.dtype.kind == "i" and raw.itemsize < 4:
        ends = np.iinfo(raw.dtype)
        if raw.min() < 0.9 * ends.min and raw.max() > 0.9 * ends.max:
            limit /= 5  # what wraps around lands at the other end of the type
    if share > limit:
        raise ScanError(
            f"{name}: {share:.2%} of the voxels are dark among bright ones, or bright among dark ones. Either bright "
            "voxels wrapped around when the file was written (convert it again, as uint16 or float32), or noise fills "
            "the background, as in the UNI image of MP2RAGE (use the denoised one, combine UNI with both inversions, "
            "or extract the brain). Dead voxels look so too."
        )


def _read_exactly(name: str, stream: BufferedIOBase, count: int) -> bytes:
    block = stream.read(count)
    if len(block) < count:
        raise ScanError(f"{name}: truncated, or not a NIfTI image (it ends before header and data do). {_AGAIN}")
    return block
