"""Read one T1w image, or say precisely why it cannot be used.

Nothing in a file is believed: sizes are checked before anything is allocated, and compressed
data are read in pieces of bounded size.
"""

from __future__ import annotations

import gzip
import logging
import math
import os
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
from bids_varaug.images.intensity import MAX_JUMP_SHARE, jump_share, standardise
from bids_varaug.models.memory import GIB, memory_bound

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
_CHUNK_BYTES = 1 << 23
# DEFLATE cannot compress by more than 1032:1, so a .gz bounds what it can hold.
_MAX_GZIP_RATIO = 1032
_CANNOT_READ = (
    HeaderDataError,
    ImageFileError,
    EOFError,
    zlib.error,
    OSError,
    OverflowError,
    ValueError,
    MemoryError,
)


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
        _check_file(path)
        with _open(path) as stream:
            header = _read_header(path, stream)
            shape = _check_shape(path, header)
            affine, warnings = choose_affine(path.name, header, trust)
            _check_affine(path, affine, shape)
            _check_memory(path, shape)
            raw = _read_data(path, stream, header, shape)
    except _CANNOT_READ as error:
        raise ScanError(
            f"{path.name}: cannot be read ({type(error).__name__}: {error}). The file is damaged; "
            "fetch or convert it again."
        ) from error
    _check_values(path, raw)
    data = standardise(raw, negative=(header.get_slope_inter()[0] or 1) < 0)
    _check_continuity(path, data)
    header.set_data_shape(shape)
    return Volume(data, affine, header, warnings)


def _check_file(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise ScanError(
            f"{path.name}: a link to content that is not here. Get it with "
            f"`datalad get {path}`, or filter it out with --bids-filter-file."
        )
    if not path.is_file():
        raise ScanError(f"{path.name}: no such file ({path}).")
    if path.stat().st_size == 0:
        raise ScanError(f"{path.name}: the file is empty (0 bytes). Fetch or convert it again.")
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise ScanError(f"{path.name}: not named .nii or .nii.gz. Convert it to NIfTI.")


def _open(path: Path) -> BinaryIO:
    if not path.name.lower().endswith(".gz"):
        return path.open("rb")
    with path.open("rb") as stream:
        magic = stream.read(2)
    if magic != b"\x1f\x8b":
        raise ScanError(
            f"{path.name}: named .gz but not gzip-compressed (it may be text or plain NIfTI). "
            "Fetch or convert it again, or give it its right name."
        )
    return gzip.open(path, "rb")


def _read_header(path: Path, stream: BinaryIO) -> nib.Nifti1Header:
    # Extensions are not read: their sizes are one more thing that a damaged file can lie about.
    block = _read_exactly(path, stream, 348)
    sizes = {int.from_bytes(block[:4], order) for order in ("little", "big")}
    if 540 in sizes:
        kind, magic = nib.Nifti2Header, b"n+2\x00"
        block += _read_exactly(path, stream, 192)
        found = block[4:8]
    elif 348 in sizes:
        kind, magic, found = nib.Nifti1Header, b"n+1\x00", block[344:348]
    else:
        raise ScanError(f"{path.name}: not a NIfTI image. Fetch it again or convert it to NIfTI.")
    if found != magic:
        raise ScanError(
            f"{path.name}: a NIfTI pair or an Analyze header, not one file with header and data. "
            "Convert it to .nii.gz."
        )
    header = kind(block, check=False)
    # nibabel would log what it mends (it does no harm) beside what it raises (we say it).
    header.check_fix(logger=_QUIET, error_level=40)
    offset = float(header["vox_offset"])
    if not (math.isfinite(offset) and len(block) + 4 <= offset < 2**30):
        raise ScanError(
            f"{path.name}: the header says that the data start at byte {offset:g}, which cannot "
            "be. Fetch or convert it again."
        )
    _skip(path, stream, int(offset) - len(block))
    return header


def _check_shape(path: Path, header: nib.Nifti1Header) -> tuple[int, int, int]:
    shape = tuple(int(n) for n in header.get_data_shape())
    text = " x ".join(str(n) for n in shape)
    if any(n < 1 for n in shape):
        raise ScanError(f"{path.name}: impossible shape ({text}). Fetch or convert it again.")
    spatial = shape[:3] + (1,) * (3 - len(shape))
    if math.prod(shape[3:]) > 1:
        raise ScanError(
            f"{path.name}: {len(shape)}D image ({text}). A T1w must be one volume; split it, or "
            "filter it out with --bids-filter-file."
        )
    if math.prod(spatial) > MAX_VOXELS:
        raise ScanError(
            f"{path.name}: the header claims {text} voxels, more than {MAX_VOXELS:,}. If the file "
            "is not damaged, crop the image to the head or resample it to 0.5 mm or coarser."
        )
    dtype = header.get_data_dtype()
    if dtype.fields is not None or dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise ScanError(
            f"{path.name}: voxels of type {header.get_value_label('datatype')}. A T1w must hold "
            "one real number per voxel; convert it to int16 or float32."
        )
    return spatial


def _check_affine(path: Path, affine: np.ndarray, shape: tuple[int, int, int]) -> None:
    fix = "If the header is wrong, correct it (fslorient, nibabel, dcm2niix); otherwise "
    sizes = voxel_sizes(affine)
    if np.abs(affine).max() > 1e6:
        raise ScanError(f"{path.name}: the affine has absurd values. {fix}crop the image.")
    if voxel_volume(affine) < MIN_SQUARENESS * sizes.prod():
        raise ScanError(f"{path.name}: the affine is strongly sheared. {fix}resample the image.")
    low, high = VOXEL_SIZE_RANGE
    if sizes.min() < low * 0.99 or sizes.max() > high * 1.01:
        raise ScanError(
            f"{path.name}: voxels of {_times(sizes, '.3g')} mm; {low:g} to {high:g} mm can be "
            f"segmented. {fix}resample the image, or filter it out with --bids-filter-file. The "
            "unit of length counts too (xyzt_units)."
        )
    extent = sizes * shape
    low, high = FIELD_OF_VIEW_RANGE
    if extent.min() < low:
        raise ScanError(
            f"{path.name}: field of view of {_times(extent, '.0f')} mm; image far too small or "
            f"cropped through the brain (at least {low:g} mm along each axis). Filter it out with "
            "--bids-filter-file."
        )
    if extent.max() > high:
        raise ScanError(
            f"{path.name}: field of view of {_times(extent, '.0f')} mm, far larger than a head "
            f"(at most {high:g} mm). {fix}crop the image."
        )


def _check_memory(path: Path, shape: tuple[int, int, int]) -> None:
    """Refuse what the kernel would kill us for."""
    need = BYTES_PER_VOXEL * math.prod(shape) / GIB
    bound = memory_bound()
    if need > bound.free:
        raise ScanError(
            f"{path.name}: {_times(shape, '.0f')} voxels need about {need:.1f} GB of memory, and "
            f"{bound.free:.1f} GB of {bound.total:.1f} are free ({bound.source}). Give more "
            "memory, run fewer steps at once (--nprocs), or resample the image."
        )


def _read_data(
    path: Path, stream: BinaryIO, header: nib.Nifti1Header, shape: tuple[int, int, int]
) -> np.ndarray:
    dtype = header.get_data_dtype()
    n_voxels = math.prod(shape)
    n_bytes = n_voxels * dtype.itemsize
    on_disk = os.stat(path).st_size
    compressed = isinstance(stream, gzip.GzipFile)
    if n_bytes > on_disk * (_MAX_GZIP_RATIO if compressed else 1):
        raise ScanError(
            f"{path.name}: the header claims {n_bytes:,} bytes of data, more than the file of "
            f"{on_disk:,} bytes can hold. It is truncated or damaged; fetch or convert it again."
        )
    # As stored: slope and intercept of the header would only round what `standardise` undoes.
    header.get_slope_inter()  # raises where they are not finite
    flat = np.empty(n_voxels, dtype=dtype.newbyteorder("="))
    step = _CHUNK_BYTES // dtype.itemsize
    for start in range(0, n_voxels, step):
        count = min(step, n_voxels - start)
        block = _read_exactly(path, stream, count * dtype.itemsize)
        flat[start : start + count] = np.frombuffer(block, dtype=dtype)
    # Reading on to the end makes gzip compare its checksum; bounded, for data that never end.
    for _ in range(64):
        if not stream.read(_CHUNK_BYTES // 8):
            break
    return np.ascontiguousarray(flat.reshape(shape, order="F"))


def _check_values(path: Path, data: np.ndarray) -> None:
    bad = data.size - int(np.count_nonzero(np.isfinite(data)))
    if bad:
        raise ScanError(
            f"{path.name}: {bad:,} of {data.size:,} voxels are NaN or infinite. Replace them "
            "(by 0 outside the head), or filter the image out with --bids-filter-file."
        )
    if data.min() == data.max():
        raise ScanError(
            f"{path.name}: every voxel is {data.flat[0]:g}; the image is empty. Fetch or convert "
            "it again, or filter it out with --bids-filter-file."
        )


def _check_continuity(path: Path, data: np.ndarray) -> None:
    share = jump_share(data)
    if share > MAX_JUMP_SHARE:
        raise ScanError(
            f"{path.name}: {share:.1%} of neighbouring voxels jump from the darkest to the "
            "brightest value. Either bright voxels wrapped around when the file was written "
            "(convert it again, as uint16 or float32), or noise fills the background, as in the "
            "UNI image of MP2RAGE (use the denoised one, combine UNI with both inversions, or "
            "extract the brain)."
        )


def _read_exactly(path: Path, stream: BinaryIO, count: int) -> bytes:
    block = stream.read(count)
    if len(block) < count:
        raise ScanError(
            f"{path.name}: truncated, or not a NIfTI image (the file ends before its header and "
            "data are complete). Fetch or convert it again."
        )
    return block


def _skip(path: Path, stream: BinaryIO, count: int) -> None:
    while count > 0:
        count -= len(_read_exactly(path, stream, min(count, _CHUNK_BYTES)))


def _times(values: np.ndarray, form: str) -> str:
    return " x ".join(format(float(v), form) for v in values)
