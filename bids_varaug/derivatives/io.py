"""Tables and images of the derivatives: written atomically and reproducibly, and read again with all damage told."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.filebasedimages import FileBasedHeader
from nibabel.nifti1 import intent_codes

from bids_varaug.derivatives.names import Output, ending_of, prefix_of
from bids_varaug.errors import UserError
from bids_varaug.files import replacing, write_text

COMPRESSION = 2  # level 9 takes ten times as long for a tenth less
SLAB = 16  # slices
_INTENTS = {suffix: intent_codes.code[name] for suffix, name in (("dseg", "label"), ("statmap", "estimate"))}


def write_table(table: pd.DataFrame, path: Path, float_format: str = "%.6g") -> Path:
    """Write a BIDS table: tabs, LF, ``n/a`` for missing values, no row names; returns `path`."""
    text = table.to_csv(sep="\t", index=False, na_rep="n/a", float_format=float_format, lineterminator="\n")
    return write_text(text, path)


def write_image(
    data: np.ndarray, affine: np.ndarray, path: Path, source_header: FileBasedHeader | None = None, slope: float = 1.0,
    **fields: Any,
) -> Path:  # fmt: skip
    """Write a NIfTI image, compressed where the name ends in ``.gz``; returns `path`.

    Data (X, Y, Z) or (X, Y, Z, N) keep their type; bool becomes uint8. Of a `numpy.memmap`, one volume at a time is in
    memory. Stored values x `slope` are values: 1/255 keeps a probability in a byte. `fields` are more of the header
    (``cal_max``, ``intent_code``); see `image_header` for the rest.
    """
    dtype = np.dtype(np.uint8) if data.dtype == bool else data.dtype
    header = image_header(data.shape, dtype, affine, source_header, slope)
    for name, value in fields.items():
        header[name] = value
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


def write_output(
    output: Output, data: np.ndarray, affine: np.ndarray, path: Path, source_header: FileBasedHeader, **fields: Any
) -> dict[str, str]:
    """Write values of an output as any image of its kind, maps of real numbers as integers of a step.

    `path` ends with the suffix of its kind (``_statmap.nii.gz``). Returns what its sidecar says of the precision. The
    rest as `write_image`.
    """
    suffix, step = path.name.rpartition("_")[2].partition(".")[0], 1 / output.per_unit if output.per_unit else 1.0
    if suffix == "statmap":
        step = step if output.per_unit else fitting_step(data)
        data = in_steps(data, step)
    fields = {"cal_max": output.cal_max, "intent_code": _INTENTS.get(suffix, 0)} | fields
    write_image(data, affine, path, source_header, step, **fields)
    text = f"Stored in steps of {step:.4g} (scl_slope): wrong by at most half a step"
    return {} if step == 1 else {"Precision": text}


def in_steps(values: np.ndarray, step: float) -> np.ndarray:
    """Values as whole numbers of steps, int16: to the nearest, ties to the even one; ValueError where that is too many.

    >>> in_steps(np.array([0.25, 1.1]), 1 / 8).tolist()
    [2, 9]
    """
    steps = np.rint(values / np.float32(step))
    if np.abs(steps).max(initial=0) > np.iinfo(np.int16).max:
        raise ValueError(f"{np.abs(values).max():g} has too many steps of {step:g} for int16")
    return steps.astype(np.int16)


def fitting_step(values: np.ndarray) -> float:
    """Power of 2 of which the largest value has 2048 to 4096: spread may be of any magnitude.

    >>> fitting_step(np.array([0.0, 0.4])) == 1 / 8192
    True
    """
    largest = float(np.abs(values).max(initial=0))
    return math.ldexp(1.0, math.frexp(largest)[1] - 12) if largest else 1.0


def image_header(
    shape: Sequence[int], dtype: np.dtype, affine: np.ndarray, source_header: FileBasedHeader | None, slope: float
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


ENDING = ending_of("members_tsv")
COLUMNS = ["member", "family", "index", "name", "volume"]
Structures = tuple[tuple[int, str], ...]


class MorphError(ValueError):
    """A table is damaged; the message says how, without the file's name."""


@dataclass(frozen=True, eq=False)
class MorphTable:
    """Volumes, (M, K) float64 [mm3], of a T1w image: `families` by member, `structures` as (index, name)."""

    families: dict[str, str]
    structures: Structures
    volumes: np.ndarray


def read_morph(path: Path) -> MorphTable:
    """Read a table of the participant level; a `MorphError` says where it is truncated or damaged."""
    data = path.read_bytes().replace(b"\r\n", b"\n").removeprefix(b"\xef\xbb\xbf")
    if data.startswith(b"/annex/objects/"):
        raise MorphError("its content was not fetched (git-annex): datalad get it")
    if not data.strip():
        raise MorphError("is empty")
    if not data.endswith(b"\n"):
        raise MorphError("is truncated: its last line has no end")
    header, *rows = [line.split("\t") for line in data.decode(errors="replace")[:-1].split("\n")]
    if header != COLUMNS:
        raise MorphError(f"lacks the columns {', '.join(COLUMNS)}")
    wrong = next((number for number, row in enumerate(rows) if len(row) != len(COLUMNS)), None)
    if wrong is not None:
        raise MorphError(f"line {wrong + 2} has {len(rows[wrong])} fields, not {len(COLUMNS)}")
    if not rows:
        raise MorphError("has no rows")
    members, families, indices, structures, volumes = zip(*rows, strict=True)
    try:
        pairs = list(zip(map(int, indices), structures, strict=True))
        values = np.array(volumes).astype(np.float64)
    except ValueError as error:
        raise MorphError("a row cannot be read: its index or its volume is no number") from error
    counts = Counter(members)
    n = counts[members[0]]
    for member, other in counts.items():
        if other != n:
            rows_of = f"of {members[0]} {n}, of {member} {other} rows"
            raise MorphError(f"is truncated or damaged: the structures of the members differ ({rows_of})")
    if list(members) != [m for m in counts for _ in range(n)] or pairs != pairs[:n] * len(counts):
        raise MorphError("is damaged: rows of a member do not stand together, or its structures are not the others'")
    if len(set(pairs[:n])) < n:
        raise MorphError(f"member {members[0]} has a structure twice")
    if not (values >= 0).all() or np.isinf(values).any():
        raise MorphError("a volume is missing, negative or infinite")
    if not values.reshape(-1, n).any(axis=1).all():
        raise MorphError("all volumes of a member are 0: it found no brain")
    return MorphTable(dict(zip(members, families, strict=True)), tuple(pairs[:n]), values.reshape(-1, n))


def read_regions(
    output_dir: Path, columns: Collection[str], images: Mapping[str, str] | None = None
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Rows of the images' tables of structures with name, `columns`, verdict, image and participant.

    `images` are the entities of the images that count (``sub-01_ses-1``) to their participant; default all. Also
    returns, for other images, why their tables cannot be read; verdict is missing (NaN) in tables of older versions.
    """
    ending, needed = ending_of("regions_tsv"), dict.fromkeys(["name", *columns])
    tables, unreadable = [pd.DataFrame()], {}
    for path in sorted(Path(output_dir).glob(f"sub-*/**/*{ending}")):
        image = prefix_of(path.name)
        if images is not None and image not in images:
            continue
        try:
            table = pd.read_csv(path, sep="\t", na_values="n/a", usecols=lambda c: c in {*needed, "verdict"})
            if not needed.keys() <= set(table):
                raise ValueError(f"it has {', '.join(table)}")
        except (OSError, ValueError) as error:
            unreadable[image] = (
                f"{path}: cannot be read as a table with columns {', '.join(sorted(needed))} ({error}). Run the "
                "participant level again for this image."
            )
            continue
        participant = images[image] if images else image.split("_")[0]
        tables.append(table.assign(image=image, participant=participant))
    table = pd.concat(tables, ignore_index=True)
    return table.reindex(columns=list(dict.fromkeys([*needed, "verdict", "image", "participant"]))), unreadable


def read_mask_volumes(output_dir: Path) -> dict[str, float]:
    """Volume of the brain mask [mm3] by image, of those whose sidecar tells it."""
    ending, volumes = ending_of("regions_tsv").removesuffix(".tsv") + ".json", {}
    for path in Path(output_dir).glob(f"sub-*/**/*{ending}"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            volumes[prefix_of(path.name)] = float(
                json.loads(path.read_text(encoding="utf-8"))["Volumes"]["brain_mask"]["Value"]
            )
    return volumes


def summarise_regions(output_dir: Path, images: Mapping[str, str] | None = None) -> dict[str, dict[str, float]]:
    """Minimum Dice and verdicts from the tables of `read_regions`: measure -> structure -> value.

    dice_min is a mean over participants (of the mean over their images), and falls as members are added; unreliable is
    the share of the images whose volume has this verdict. A `UserError` says that a table cannot be read.
    """
    table, unreadable = read_regions(output_dir, ["dice_min"], images)
    for reason in unreadable.values():
        raise UserError(reason)
    per_person = table.groupby(["name", "participant"], sort=False)["dice_min"].mean()
    judged = table.dropna(subset="verdict")
    return {
        "dice_min": per_person.groupby("name", sort=False).mean().dropna().to_dict(),
        "unreliable": judged["verdict"].eq("unreliable").groupby(judged["name"], sort=False).mean().to_dict(),
    }
