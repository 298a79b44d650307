"""FastSurfer's checkpoints, read without running anything that they hold, become an ensemble of safetensors.

A checkpoint is a pickle within a zip file, and a pickle may name any function to be called. Only what torch knows as
harmless and the few names that numpy's numbers need are allowed; a file that names anything else is refused before it
is read.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from bids_varaug.errors import EnsembleError, UsageError
from bids_varaug.models.ensemble import (
    BASELINE,
    PLANES,
    Ensemble,
    Member,
    VinnShape,
    sha256_of,
    write_manifest,
)
from bids_varaug.models.fastsurfer import Vinn, n_classes_of, save_planes
from bids_varaug.models.fastsurfer_labels import read_labels

SUFFIXES = (".pkl", ".pt", ".pth")
_SCALAR = cast(Callable, np.float64(0).__reduce__()[0])
# A checkpoint holds its best score, a number of numpy 1 or of numpy 2.
_ALLOWED: list[Callable | tuple[Callable, str]] = [(np.dtype, "numpy.dtype")]
_ALLOWED += [(_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
_ALLOWED += [(type(np.dtype(kind)), f"numpy.dtypes.{kind.title()}DType") for kind in ("float64", "float32")]
_MEMBER = re.compile(r"ieee|(mca|seed)(\d\d)")


def read_checkpoint(path: Path, plane: str) -> dict[str, torch.Tensor]:
    """Return the state dictionary of a plane's network from a file of FastSurfer's training, nothing of it executed.

    Raises `EnsembleError`, which names the file, if it is absent, no checkpoint or truncated; names code other than
    tensors and numbers; or holds another network, or one of another plane.
    """
    try:
        with safe_globals(_ALLOWED):
            if code := sorted(get_unsafe_globals_in_checkpoint(str(path))):
                raise EnsembleError(
                    f"{path}: this file names code ({', '.join(code)}), which a checkpoint of FastSurfer does not. It "
                    "was not read, and nothing in it was executed. Take the file from FastSurfer's own release, or "
                    "save its model_state alone."
                )
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise EnsembleError(f"{path}: no such file.") from error
    except (ValueError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise EnsembleError(f"{path}: no checkpoint, or a truncated one ({reason}). Fetch it again.") from error
    state = content.get("model_state", content) if isinstance(content, dict) else {}
    return _checked(path, plane, state)


def _checked(path: Path, plane: str, state: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """State of exactly the names and shapes that the plane's network has, in float32."""
    with torch.device("meta"):
        wanted = {name: t.shape for name, t in Vinn(VinnShape(), n_classes_of(plane)).state_dict().items()}
    tensors = {str(name).removeprefix("module."): t for name, t in state.items() if isinstance(t, torch.Tensor)}
    missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unknown:
        raise EnsembleError(
            f"{path}: not a network of FastSurferVINN: {len(missing)} of its {len(wanted)} tensors are missing"
            f"{_first(missing)}, {len(unknown)} are unknown{_first(unknown)}. Convert the checkpoints named "
            "aparc_vinn_PLANE_v2.0.0.pkl."
        )
    n_classes = tensors["classifier.conv.weight"].shape[0]
    if n_classes != n_classes_of(plane):
        raise EnsembleError(
            f"{path}: a network of {n_classes} classes, but the {plane} one has {n_classes_of(plane)}. Is the file of "
            "another plane? The plane is taken from its name."
        )
    wrong = [name for name, shape in wanted.items() if tensors[name].shape != shape]
    if wrong:
        raise EnsembleError(f"{path}: another network than FastSurferVINN: {len(wrong)} tensors have other shapes"
                            f"{_first(wrong)}.")  # fmt: skip
    values = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    if not all(torch.isfinite(value).all() for value in values.values()):
        raise EnsembleError(f"{path}: weights are NaN or infinite: the training failed. Choose another checkpoint.")
    return values


def _first(names: Sequence[str]) -> str:
    return f" ({names[0]}{', ...' if len(names) > 1 else ''})" if names else ""


def find_planes(files: Sequence[Path]) -> dict[str, Path]:
    """Return the checkpoint of each plane, told by the names of files, or of those in a folder; else `UsageError`."""
    paths = [path for file in files for path in (sorted(file.iterdir()) if file.is_dir() else [file])]
    paths = [path for path in paths if path.suffix in SUFFIXES or path in files]
    found: dict[str, Path] = {}
    for path in paths:
        planes = [plane for plane in PLANES if plane in path.name.lower()]
        if len(planes) != 1:
            raise UsageError(f"{path}: its name says {' and '.join(planes) or 'no plane'}; it must contain one of "
                             f"{', '.join(PLANES)}. Rename a copy.")  # fmt: skip
        if planes[0] in found:
            raise UsageError(f"{path}: {found[planes[0]]} is {planes[0]} too. A member has one checkpoint a plane.")
        found[planes[0]] = path
    if missing := [plane for plane in PLANES if plane not in found]:
        where = ", ".join(str(file) for file in files)
        raise UsageError(f"{where}: no checkpoint of the {' and '.join(missing)} plane. All three are needed.")
    return found


def convert(members: Mapping[str, Sequence[Path]], directory: Path, name: str | None = None) -> Ensemble:
    """Write an ensemble of FastSurfer's networks: one file of weights for each member, and the manifest.

    Parameters
    ----------
    members : files, or folders of files, by id of the member: "ieee" for FastSurfer's own checkpoints, "mcaNN" and
        "seedNN" for those of trainings that differ by perturbation or by seed
    directory : a new or an empty folder
    name : of the ensemble; default: that of the folder

    Raises
    ------
    UsageError, EnsembleError
        As `find_planes` and `read_checkpoint`, before anything is written.
    """
    for member in members:
        if not _MEMBER.fullmatch(member):
            raise UsageError(f"--member {member}: an id is {BASELINE}, mcaNN or seedNN (mca01, seed12).")
    if directory.exists() and any(directory.iterdir()):
        raise UsageError(f"{directory}: the folder is not empty. Choose another, or empty it.")
    files = {member: find_planes(paths) for member, paths in members.items()}
    states = {m: {plane: read_checkpoint(path, plane) for plane, path in of.items()} for m, of in files.items()}
    sources = {m: {plane: {"File": p.name, "SHA256": sha256_of(p)} for plane, p in of.items()}
               for m, of in files.items()}  # fmt: skip
    written = tuple(_write(directory, m, states[m], sources[m]) for m in sorted(states, key=_rank))
    ensemble = Ensemble(
        name or directory.resolve().name, "1", directory, 1.0, read_labels(), VinnShape(), written,
        {"software": "FastSurfer", "sources": sources},
    )  # fmt: skip
    write_manifest(ensemble)
    return ensemble


def _rank(member: str) -> tuple[bool, str]:
    return member != BASELINE, member


def _write(directory: Path, member: str, state: dict[str, dict[str, torch.Tensor]], sources: dict) -> Member:
    path = directory / f"{member}.safetensors"
    metadata = {f"{plane}_sha256": source["SHA256"] for plane, source in sources.items()}
    sha256 = save_planes(path, {plane: state[plane] for plane in PLANES}, metadata)
    found = _MEMBER.fullmatch(member)
    family, number = (found[1], int(found[2])) if found and found[1] else (BASELINE, 0)
    # What the trainings were perturbed with, other than the family, the files do not say.
    return Member(member, family, 0 if family == "mca" else number, None, path.name, sha256)
