"""Writing of tables and images, atomic and reproducible as `bids_varaug.atomic` says."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.filebasedimages import FileBasedHeader

from bids_varaug.atomic import replacing, write_text

COMPRESSION = 2  # level 9 takes ten times as long for a tenth less
SLAB = 16  # slices


def write_table(table: pd.DataFrame, path: Path, float_format: str = "%.6g") -> Path:
    """Write a BIDS table: tabs, LF, ``n/a`` for missing values, no row names; returns `path`."""
    text = table.to_csv(sep="\t", index=False, na_rep="n/a", float_format=float_format, lineterminator="\n")
    return write_text(text, path)


def write_image(
    data: np.ndarray, affine: np.ndarray, path: Path, source_header: FileBasedHeader | None = None, slope: float = 1.0
) -> Path:
    """Write a NIfTI image, compressed where the name ends in ``.gz``; returns `path`.

    Data (X, Y, Z) or (X, Y, Z, N) keep their type; bool becomes uint8. Of a `numpy.memmap`, one volume at a time is in
    memory. Stored values x `slope` are values: 1/255 keeps a probability in a byte. See `image_header` for the rest.
    """
    dtype = np.dtype(np.uint8) if data.dtype == bool else data.dtype
    header = image_header(data.shape, dtype, affine, source_header, slope)
    volumes = [data] if data.ndim == 3 else np.moveaxis(data, 3, 0)
    with replacing(path) as raw:
        # No name and no time in gzip's header, for equal bytes.
        zipped = str(path).endswith(".gz")
        with gzip.GzipFile("", "wb", COMPRESSION, raw, mtime=0) if zipped else nullcontext(raw) as stream:
            stream.write(header.binaryblock + b"\0\0\0\0")  # no extensions follow
            for volume in volumes:
                # NIfTI runs over x fastest; a slab at a time keeps the reordered copy small.
                whole = np.ascontiguousarray(volume)
                for z in range(0, data.shape[2], SLAB):
                    stream.write(whole[..., z : z + SLAB].astype(dtype.newbyteorder("<")).tobytes(order="F"))
    return Path(path)


def image_header(
    shape: Sequence[int],
    dtype: np.dtype,
    affine: np.ndarray,
    source_header: FileBasedHeader | None = None,
    slope: float = 1.0,
) -> nib.Nifti1Header:
    """NIfTI-1 header of a single-file image in mm.

    Where `source_header` has the same grid, its qform and sform are copied exactly, so that any tool sees output and
    T1w aligned whichever of the two it reads. Otherwise, and where the two differ in voxel size, `affine` is set as
    both, with the source's codes (1, scanner, where there are none).
    """
    header = nib.Nifti1Header(endianness="<")
    header.set_data_shape(tuple(int(n) for n in shape))
    header.set_data_dtype(dtype)
    header.set_slope_inter(slope, 0)
    source = source_header if isinstance(source_header, nib.Nifti1Header) else nib.Nifti1Header()
    code = max(int(source["qform_code"]), int(source["sform_code"]))
    same_grid = (
        code > 0
        and np.allclose(source.get_best_affine(), affine, atol=1e-4)
        and np.allclose(nib.affines.voxel_sizes(affine), source["pixdim"][1:4], rtol=0.01)
        and source.get_data_shape()[:3] == tuple(shape[:3])
    )
    if same_grid:
        for name in ("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
                     "sform_code", "srow_x", "srow_y", "srow_z"):  # fmt: skip
            header[name] = source[name]
        header["pixdim"][:4] = source["pixdim"][:4]
    else:
        header.set_sform(affine, code or 1)
        header.set_qform(affine, code or 1, strip_shears=True)
    header.set_xyzt_units("mm")
    header["vox_offset"] = 352
    return header


def with_bids_labels(table: pd.DataFrame) -> pd.DataFrame:
    """Spell ids as BIDS wants them, letters and digits; what they were goes to `source_id`.

    Ids of tables made elsewhere may have other characters. Where two would become one, all stay as they are.

    Examples
    --------
    >>> with_bids_labels(pd.DataFrame({"participant_id": ["sub-A_1", "sub-02"]}))
      participant_id source_id
    0         sub-A1   sub-A_1
    1         sub-02    sub-02
    """
    ids = table["participant_id"]
    plain = "sub-" + ids.str.removeprefix("sub-").str.replace(r"[^0-9A-Za-z+]", "", regex=True)
    if (plain == ids).all() or plain.nunique() < ids.nunique():
        return table
    return table.assign(participant_id=plain, source_id=ids)
