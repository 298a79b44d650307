"""Writing of tables and images, atomic and reproducible as `bids_varaug.atomic` says."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt

from bids_varaug.atomic import replacing, write_text

if TYPE_CHECKING:
    import nibabel as nib
    import pandas as pd

COMPRESSION = 2  # level 9 takes ten times as long for a tenth less
SLAB = 16  # slices


def write_table(table: pd.DataFrame, path: Path, float_format: str = "%.6g") -> Path:
    """Write a BIDS table: tabs, LF, ``n/a`` for missing values, no row names; returns `path`."""
    text = table.to_csv(sep="\t", index=False, na_rep="n/a", float_format=float_format, lineterminator="\n")
    return write_text(text, path)


def write_image(
    data: np.ndarray, affine: np.ndarray, path: Path, source_header: nib.Nifti1Header | None = None
) -> Path:
    """Write a 3D NIfTI image, compressed where the name ends in ``.gz``; returns `path`.

    Parameters
    ----------
    data : (X, Y, Z), written in its own type; bool as uint8
    affine : (4, 4) float, voxel indices to mm
    path : Path
    source_header : Nifti1Header, optional
        Of the image whose grid this is, see `image_header`.
    """
    data = data.astype(np.uint8) if data.dtype == bool else data
    return write_image_series([data], data.shape, affine, path, data.dtype, source_header)


def write_image_series(
    volumes: Iterable[np.ndarray],
    shape: Sequence[int],
    affine: np.ndarray,
    path: Path,
    dtype: npt.DTypeLike,
    source_header: nib.Nifti1Header | None = None,
    slope: float = 1.0,
) -> Path:
    """Write a NIfTI image volume by volume, so that only one is in memory; returns `path`.

    Parameters
    ----------
    volumes : iterable of (X, Y, Z), as they shall stand in the file
    shape : (X, Y, Z) or (X, Y, Z, N)
    dtype : of the volumes and the file
    slope : stored value x `slope` = value; e.g. 1/255 keeps a probability in a byte
    affine, path, source_header
        As `write_image`.

    Raises
    ------
    ValueError
        If the volumes are not N (or one) of shape (X, Y, Z) and of type `dtype`.
    """
    dtype, one = np.dtype(dtype), tuple(shape[:3])
    header = image_header(shape, dtype, affine, source_header, slope)
    expected = shape[3] if len(shape) == 4 else 1
    written = 0
    with replacing(path) as raw, _maybe_gzip(raw, path) as stream:
        stream.write(header.binaryblock + b"\0\0\0\0")  # no extensions follow
        for volume in volumes:
            if volume.shape != one or volume.dtype != dtype:
                raise ValueError(
                    f"{path}: volume of shape {volume.shape} and type {volume.dtype}, not {one} and {dtype}"
                )
            # NIfTI runs over x fastest; a slab at a time keeps the reordered copy small.
            for z in range(0, shape[2], SLAB):
                slab = volume[..., z : z + SLAB].astype(dtype.newbyteorder("<"))
                stream.write(slab.tobytes(order="F"))
            written += 1
        if written != expected:
            raise ValueError(f"{path}: {written} volumes instead of {expected}")
    return Path(path)


@contextmanager
def _maybe_gzip(raw: BinaryIO, path: Path) -> Iterator[BinaryIO]:
    """Compress where the name says so; no name and no time in the header, for equal bytes."""
    if not str(path).endswith(".gz"):
        yield raw
        return
    with gzip.GzipFile("", "wb", compresslevel=COMPRESSION, fileobj=raw, mtime=0) as stream:
        yield stream


def image_header(
    shape: Sequence[int],
    dtype: np.dtype,
    affine: np.ndarray,
    source_header: nib.Nifti1Header | None = None,
    slope: float = 1.0,
) -> nib.Nifti1Header:
    """NIfTI-1 header of a single-file image in mm.

    Where `source_header` has the same grid, its qform and sform are copied exactly, so that any tool sees output and
    T1w aligned whichever of the two it reads. Otherwise, and where the two differ in voxel size, `affine` is set as
    both, with the source's codes (1, scanner, where there are none).
    """
    import nibabel as nib

    header = nib.Nifti1Header(endianness="<")
    header.set_data_shape(tuple(int(n) for n in shape))
    header.set_data_dtype(dtype)
    header.set_slope_inter(slope, 0)
    is_nifti = isinstance(source_header, nib.Nifti1Header)
    codes = (int(source_header["qform_code"]), int(source_header["sform_code"])) if is_nifti else ()
    same_grid = (
        is_nifti
        and any(codes)
        and np.allclose(source_header.get_best_affine(), affine, atol=1e-4)
        and np.allclose(nib.affines.voxel_sizes(affine), source_header["pixdim"][1:4], rtol=0.01)
        and source_header.get_data_shape()[:3] == tuple(shape[:3])
    )
    if same_grid:
        for name in ("qform_code", "sform_code", "srow_x", "srow_y", "srow_z"):
            header[name] = source_header[name]
        for name in ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"):
            header[name] = source_header[name]
        header["pixdim"][:4] = source_header["pixdim"][:4]
    else:
        code = max(codes, default=0) or 1
        header.set_sform(affine, code)
        header.set_qform(affine, code, strip_shears=True)
    header.set_xyzt_units("mm")
    header["vox_offset"] = 352
    return header
