"""Read one T1w image, or say precisely why it cannot be used.

Nothing in a file is believed: sizes are checked before anything is allocated, and no more is read
than the header claims and the file can hold.
"""

from __future__ import annotations

import gzip
import logging
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from bids_varaug.errors import ScanError
from bids_varaug.images.affine import choose_affine, voxel_sizes, voxel_volume
from bids_varaug.images.intensity import MAX_SPIKE_SHARE, spike_share, standardise
from bids_varaug.machine import GIB, memory_bound

MAX_VOXELS = 400_000_000
"""More voxels than a head of 220 mm has at 0.3 mm; 1.6 GB as float32."""
BYTES_PER_VOXEL = 16
"""Most memory that reading and conforming take: four float32 copies at once."""
VOXEL_SIZE_RANGE = (0.3, 5.0)
"""mm. Structures are a few mm thick: larger voxels do not show them."""
FIELD_OF_VIEW_RANGE = (70.0, 600.0)
"""mm along each axis. Below, the brain cannot be whole; above, it is no image of a head."""
MIN_SQUARENESS = 0.5
"""|determinant| of the unit voxel axes: 1 for right angles, 0.87 for a gantry tilt of 30 deg."""

_QUIET = logging.Logger("nibabel header checks", level=logging.CRITICAL + 1)
# DEFLATE cannot compress by more than 1032:1, so a .gz bounds what it can hold.
_MAX_GZIP_RATIO = 1032
_MAX_TRAILING_BYTES = 1 << 26
_CANNOT_READ = (HeaderDataError, ImageFileError, EOFError, zlib.error, OSError, OverflowError,
                ValueError, MemoryError)  # fmt: skip
_AGAIN = "Fetch or convert it again."
_FILTER = "filter it out with --bids-filter-file."


class _Refused(Exception):
    """What is wrong and what to do, without the file's name."""


@dataclass(frozen=True)
class Volume:
    """One image volume.

    Attributes
    ----------
    data : (X, Y, Z) float32
    affine : (4, 4) float64, voxel index -> mm, RAS+ world
    header : nibabel NIfTI header, its shape that of `data`
    warnings : what was taken otherwise than as it stands in the header
    """

    data: np.ndarray
    affine: np.ndarray
    header: nib.Nifti1Header
    warnings: tuple[str, ...] = ()


def load_t1w(path: Path, trust: str | None = None) -> Volume:
    """Read a T1w image from ``.nii`` or ``.nii.gz``.

    Parameters
    ----------
    path : Path
    trust : "sform" or "qform", where they contradict each other; see `choose_affine`

    Returns
    -------
    Volume
        On the file's own grid, intensities as `standardise` leaves them.

    Raises
    ------
    ScanError
        If the file is absent, empty, damaged or not NIfTI; is not one 3D volume of real numbers;
        has NaN, infinite or only equal values, or values that wrapped around; does not say where
        left and right are; or its voxels or field of view cannot be those of a head.
    """
    path = Path(path)
    try:
        header, shape, affine, warnings, raw = _read(path, trust)
        _check_values(raw)
        data = standardise(raw, negative=(header.get_slope_inter()[0] or 1) < 0)
        _check_continuity(data, raw)
    except _Refused as refused:
        raise ScanError(f"{path.name}: {refused}") from refused.__cause__
    header.set_data_shape(shape)
    return Volume(data, affine, header, warnings)


def _read(path: Path, trust: str | None) -> tuple:
    """Header, shape, affine, warnings, and the values as stored."""
    try:
        with _open(path) as stream:
            header = _read_header(stream)
            shape = _check_shape(header)
            affine, warnings = choose_affine(path.name, header, trust)
            _check_affine(affine, shape)
            _check_memory(shape)
            return header, shape, affine, warnings, _read_data(path, stream, header, shape)
    except _CANNOT_READ as error:
        raise _Refused(
            f"cannot be read ({type(error).__name__}: {error}). The file is damaged; "
            "fetch or convert it again."
        ) from error


def _open(path: Path) -> BinaryIO:
    if path.is_symlink() and not path.exists():
        raise _Refused(
            f"a link to content that is not here. Get it with `datalad get {path}`, or {_FILTER}"
        )
    if not path.is_file():
        raise _Refused(f"no such file ({path}).")
    if path.stat().st_size == 0:
        raise _Refused(f"the file is empty (0 bytes). {_AGAIN}")
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise _Refused("not named .nii or .nii.gz. Convert it to NIfTI.")
    stream = path.open("rb")
    if not path.name.lower().endswith(".gz"):
        return stream
    with stream:
        if stream.read(2) != b"\x1f\x8b":
            raise _Refused(
                "named .gz but not gzip-compressed (it may be text or plain NIfTI). "
                "Fetch or convert it again, or give it its right name."
            )
    return gzip.open(path, "rb")


def _read_header(stream: BinaryIO) -> nib.Nifti1Header:
    # Extensions are not read: their sizes are one more thing that a damaged file can lie about.
    block = _read_exactly(stream, 348)
    sizes = {int.from_bytes(block[:4], order) for order in ("little", "big")}
    if not sizes & {348, 540}:
        raise _Refused("not a NIfTI image. Fetch it again or convert it to NIfTI.")
    kind = nib.Nifti2Header if 540 in sizes else nib.Nifti1Header
    header = kind(block + _read_exactly(stream, kind.sizeof_hdr - 348), check=False)
    if header["magic"] != kind.single_magic:
        raise _Refused(
            "a NIfTI pair or an Analyze header, not one file with header and data. "
            "Convert it to .nii.gz."
        )
    # nibabel would log what it mends (it does no harm) beside what it raises (we say it).
    sizes = header["pixdim"][1:4].copy()
    header.check_fix(logger=_QUIET, error_level=40)
    header["pixdim"][1:4] = np.abs(sizes)  # a size of 0 is no size, and not 1
    offset = float(header["vox_offset"])
    if not (math.isfinite(offset) and kind.sizeof_hdr + 4 <= offset < 2**30):
        raise _Refused(
            f"the header says that the data start at byte {offset:g}, which cannot be. {_AGAIN}"
        )
    return header


def _check_shape(header: nib.Nifti1Header) -> tuple[int, int, int]:
    shape = tuple(int(n) for n in header.get_data_shape())
    text = " x ".join(str(n) for n in shape)
    if any(n < 1 for n in shape):
        raise _Refused(f"impossible shape ({text}). {_AGAIN}")
    if math.prod(shape[3:]) > 1:
        raise _Refused(
            f"{len(shape)}D image ({text}). A T1w must be one volume; split it, or {_FILTER}"
        )
    if math.prod(shape) > MAX_VOXELS:
        raise _Refused(
            f"the header claims {text} voxels, more than {MAX_VOXELS:,}. If the file is not "
            "damaged, crop the image to the head or resample it to 0.5 mm or coarser."
        )
    dtype = header.get_data_dtype()
    if dtype.fields is not None or dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise _Refused(
            f"voxels of type {header.get_value_label('datatype')}. A T1w must hold one real number "
            "per voxel; convert it to int16 or float32."
        )
    return (*shape, 1, 1, 1)[:3]


def _check_affine(affine: np.ndarray, shape: tuple[int, int, int]) -> None:
    fix = "If the header is wrong, correct it (fslorient, nibabel, dcm2niix); otherwise "
    sizes = voxel_sizes(affine)
    extent = sizes * shape
    if np.abs(affine).max() > 1e6:
        raise _Refused(f"the affine has absurd values. {fix}crop the image.")
    if voxel_volume(affine) < MIN_SQUARENESS * sizes.prod():
        raise _Refused(f"the affine is strongly sheared. {fix}resample the image.")
    low, high = VOXEL_SIZE_RANGE
    if sizes.min() < low * 0.99 or sizes.max() > high * 1.01:
        raise _Refused(
            f"voxels of {_times(sizes, '.3g')} mm; {low:g} to {high:g} mm can be segmented. "
            f"{fix}resample the image, or {_FILTER} The unit of length counts too (xyzt_units)."
        )
    low, high = FIELD_OF_VIEW_RANGE
    if extent.min() < low:
        raise _Refused(
            f"field of view of {_times(extent, '.0f')} mm; image far too small or cropped through "
            f"the brain (at least {low:g} mm along each axis). Filter it out with "
            "--bids-filter-file."
        )
    if extent.max() > high:
        raise _Refused(
            f"field of view of {_times(extent, '.0f')} mm, far larger than a head (at most "
            f"{high:g} mm). {fix}crop the image."
        )


def _check_memory(shape: tuple[int, int, int]) -> None:
    """Refuse what the kernel would kill us for."""
    need = BYTES_PER_VOXEL * math.prod(shape) / GIB
    bound = memory_bound()
    if need > bound.free:
        raise _Refused(
            f"{_times(shape, '.0f')} voxels need about {need:.1f} GB of memory, and "
            f"{bound.free:.1f} GB of {bound.total:.1f} are free ({bound.source}). Give more "
            "memory, run fewer steps at once (--nprocs), or resample the image."
        )


def _read_data(
    path: Path, stream: BinaryIO, header: nib.Nifti1Header, shape: tuple[int, int, int]
) -> np.ndarray:
    dtype = header.get_data_dtype()
    n_bytes = math.prod(shape) * dtype.itemsize
    on_disk = path.stat().st_size
    compressed = isinstance(stream, gzip.GzipFile)
    if n_bytes > on_disk * (_MAX_GZIP_RATIO if compressed else 1):
        raise _Refused(
            f"the header claims {n_bytes:,} bytes of data, more than the file of {on_disk:,} bytes "
            f"can hold. It is truncated or damaged; fetch or convert it again."
        )
    # As stored: slope and intercept of the header would only round what `standardise` undoes.
    header.get_slope_inter()  # raises where they are not finite
    stream.seek(int(header["vox_offset"]))
    stored = np.frombuffer(_read_exactly(stream, n_bytes), dtype).reshape(shape, order="F")
    # Reading on to the end makes gzip compare its checksum; bounded, for data that never end.
    stream.read(_MAX_TRAILING_BYTES)
    return np.array(stored, dtype.newbyteorder("="), order="C")


def _check_values(data: np.ndarray) -> None:
    bad = data.size - int(np.count_nonzero(np.isfinite(data)))
    if bad:
        raise _Refused(
            f"{bad:,} of {data.size:,} voxels are NaN or infinite. Replace them (by 0 outside the "
            "head), or filter the image out with --bids-filter-file."
        )
    if data.min() == data.max():
        raise _Refused(
            f"every voxel is {data.flat[0]:g}; the image is empty. Fetch or convert it again, or "
            f"{_FILTER}"
        )


def _check_continuity(data: np.ndarray, raw: np.ndarray) -> None:
    share, limit = spike_share(data), MAX_SPIKE_SHARE
    if raw.dtype.kind == "i" and raw.itemsize < 4:
        ends = np.iinfo(raw.dtype)
        if raw.min() < 0.9 * ends.min and raw.max() > 0.9 * ends.max:
            limit /= 5  # what wraps around lands at the other end of the type
    if share > limit:
        raise _Refused(
            f"{share:.2%} of the voxels are dark among bright ones, or bright among dark ones. "
            "Either bright voxels wrapped around when the file was written (convert it again, as "
            "uint16 or float32), or noise fills the background, as in the UNI image of MP2RAGE "
            "(use the denoised one, combine UNI with both inversions, or extract the brain). Dead "
            "voxels look so too."
        )


def _read_exactly(stream: BinaryIO, count: int) -> bytes:
    block = stream.read(count)
    if len(block) < count:
        raise _Refused(
            "truncated, or not a NIfTI image (the file ends before its header and data are "
            f"complete). {_AGAIN}"
        )
    return block


def _times(values: np.ndarray, form: str) -> str:
    return " x ".join(format(float(v), form) for v in values)
