"""Gather what the participant level left into a cohort."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bids_varaug.brainage import provenance
from bids_varaug.brainage.cohort import Cohort, Gathered, assemble
from bids_varaug.brainage.features_table import look_up_people, match_people
from bids_varaug.brainage.provenance import MixedDerivativesError, Origin
from bids_varaug.derivatives import names
from bids_varaug.errors import NoInputError
from bids_varaug.inputs.participants import People
from bids_varaug.inputs.scans import natural_key
from bids_varaug.inputs.tables import some

ENDING = names.OUTPUTS["members_tsv"].name("")
COLUMNS = ["member", "family", "index", "name", "volume"]
UNIT = "mm3"
Structures = tuple[tuple[int, str], ...]


class MorphError(ValueError):
    """A table is damaged; the message says how, without the file's name."""


@dataclass(frozen=True, eq=False)
class MorphTable:
    """Volumes, (M, K) float64 [mm3], of a T1w image: `families` by member, `structures` as (index, name)."""

    families: dict[str, str]
    structures: Structures
    volumes: np.ndarray


@dataclass(frozen=True, eq=False)
class _Image:
    """A table, the entities of its image, and who made it."""

    participant_id: str
    session_id: str | None
    observation: str
    table: MorphTable
    origin: Origin


def gather_cohort(
    output_dir: Path,
    people: People,
    *,
    features: Sequence[str] | None = None,
    require_age: bool = True,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Cohort:
    """Read the volumes of every image by every member (``*_desc-members_morph.tsv``).

    A feature is the volume of a structure in mm3. All perturbed members count alike, whether training (mca, seed) or
    inference (rr) was perturbed. Images that are damaged, truncated, lack members that most others have, or belong to
    people without age or not in participants.tsv are left out, each with a reason; so are people who have no image.

    Parameters
    ----------
    output_dir : of the participant level
    people : of participants.tsv
    features, require_age : as `assemble`
    progress : wraps the list of files, such as ``tqdm``

    Returns
    -------
    Cohort
        Its `source` (JSON types): "kind" ("bids_varaug"), "ensemble", "ensemble_version", "bids_varaug" (version),
        "sloppy", "sha256" by member, "families" (ids of the used perturbed members by family), "notes" (on ids that
        participants.tsv spells differently); and what `assemble` adds.

    Raises
    ------
    NoInputError
        If this is no output of the participant level, or has no such table.
    MixedDerivativesError
        If they were not all made by one ensemble and version, as far as that can be told; each is listed.
    CohortError
        If nobody is left.
    """
    output_dir = Path(output_dir)
    root = provenance.read_root(output_dir)
    files = [path for sub in ("sub-*/anat", "sub-*/ses-*/anat") for path in output_dir.glob(f"{sub}/sub-*{ENDING}")]
    if not files:
        raise NoInputError(f"{output_dir}: no sub-*/[ses-*/]anat/*{ENDING}. Run the participant level first.")
    files.sort(key=lambda path: (natural_key(path.name), path.name))
    left_out: dict[str, str] = {}
    images = _read_images(progress(files), output_dir, left_out)
    _check_origins(root, images)
    images = _same_structures(images, left_out)
    notes: list[str] = []
    there = {path.relative_to(output_dir).parts[0]: None for path in files}
    sessions = {part for path in files for part in path.parent.parts[-2:-1] if part.startswith("ses-")}
    same = match_people(people, there, sessions, output_dir.name, notes)
    without = set(people.participants) - {same.get(p, p) for p in there}
    left_out |= {p: f"no *{ENDING}: the participant level gave nothing" for p in people.participants if p in without}
    ids = [(image.participant_id, image.session_id, image.observation) for image in images]
    frame = pd.DataFrame(ids, columns=["participant_id", "session_id", "observation"], dtype=object)
    frame, age_reasons = look_up_people(frame, people, same)
    found = Gathered(frame, *_stacked([image.table for image in images]), left_out, age_reasons)
    source = _source(root, images) | {"notes": notes}
    cohort = assemble(found, source, UNIT, features=features, require_age=require_age)
    family_of = {member: family for image in images for member, family in image.table.families.items()}
    families = {family_of[member]: [m for m in cohort.member_ids if family_of[m] == family_of[member]]
                for member in cohort.member_ids}  # fmt: skip
    return replace(cohort, source=cohort.source | {"families": families})


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
        raise MorphError(f"a row cannot be read, it holds no number ({error})") from error
    by_member: dict[str, list[tuple[int, str]]] = {}
    for member, pair in zip(members, pairs, strict=True):
        by_member.setdefault(member, []).append(pair)
    first_member, first = next(iter(by_member.items()))
    if len(set(first)) < len(first):
        raise MorphError(f"member {first_member} has a structure twice")
    for member, theirs in by_member.items():
        if theirs != first:
            raise MorphError(
                f"is truncated or damaged: the structures of the members differ (of {first_member} {len(first)}, of "
                f"{member} {len(theirs)} rows)"
            )
    if list(members) != [member for member in by_member for _ in first]:
        raise MorphError("rows of a member do not stand together")
    if not (values >= 0).all() or np.isinf(values).any():
        raise MorphError("a volume is missing, negative or infinite")
    return MorphTable(dict(zip(members, families, strict=True)), tuple(first), values.reshape(-1, len(first)))


def _read_images(files: Iterable[Path], output_dir: Path, left_out: dict[str, str]) -> list[_Image]:
    images = []
    for path in files:
        relative = path.relative_to(output_dir)
        folders, observation = relative.parts[:-2], path.name.removesuffix(ENDING)
        if not f"{observation}_".startswith(f"{'_'.join(folders)}_"):
            left_out[str(relative)] = f"lies in the folder of {'_'.join(folders)}, whose name it does not have"
            continue
        try:
            sidecar = _read_json(path.with_suffix(".json"))
            table = read_morph(path)
            named = sidecar.get("Members")
            lacking = [m for m in named if m not in table.families] if isinstance(named, list) else []
            if lacking:
                raise MorphError(f"is truncated: of the members in its sidecar, {some(lacking)} are missing")
        except MorphError as error:
            left_out[observation] = f"{relative}: {error}"
            continue
        except OSError as error:
            left_out[observation] = f"{relative}: cannot be read ({error.strerror})"
            continue
        session = folders[1] if len(folders) > 1 else None
        images.append(_Image(folders[0], session, observation, table, provenance.sidecar_origin(sidecar, observation)))
    return images


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise MorphError(f"its sidecar is damaged ({error})") from error
    return content if isinstance(content, dict) else {}


def _check_origins(root: Origin, images: list[_Image]) -> None:
    """Refuse a mixture of ensembles, versions or settings."""
    origins = [root, *(image.origin for image in images)]
    provenance.check_same_origin(origins)
    known = set().union(*(origin.sha256 for origin in origins))
    strangers = {image.observation: [m for m in image.table.families if m not in known] for image in images}
    listed = [f"{name} ({some(members)})" for name, members in strangers.items() if members]
    if listed:
        raise MixedDerivativesError(
            f"made by members that neither {names.DESCRIPTIONS_TABLE} nor any sidecar knows: {some(listed, '; ')}. "
            "They come from another ensemble or run; give each ensemble an output directory of its own."
        )


def _same_structures(images: list[_Image], left_out: dict[str, str]) -> list[_Image]:
    """Leave out images that lack structures; refuse those that have others."""
    if not images:
        return []
    every: dict[Structures, list[_Image]] = {}
    for image in images:
        every.setdefault(image.table.structures, []).append(image)
    usual = max(every, key=lambda structures: (len(every[structures]), len(structures)))
    strange = [i.observation for structures, theirs in every.items() if set(structures) - set(usual) for i in theirs]
    if strange:
        raise MixedDerivativesError(
            f"other structures than in the other {len(images) - len(strange)} images: {some(strange)}. They come from "
            "another ensemble; give each ensemble an output directory of its own."
        )
    for structures, theirs in every.items():
        lacking = [structure[1] for structure in usual if structure not in structures]
        if lacking:
            left_out.update({image.observation: f"is truncated: {some(lacking)} missing" for image in theirs})
    return every[usual]


def _stacked(tables: list[MorphTable]) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """Values, which members are present, their ids, and names of the structures."""
    most_first = sorted(tables, key=lambda table: -len(table.families))
    ids = list(dict.fromkeys(member for table in most_first for member in table.families))
    structures = tuple(name for _, name in tables[0].structures) if tables else ()
    values = np.full((len(tables), len(ids), len(structures)), np.nan)
    for row, table in enumerate(tables):
        values[row, [ids.index(member) for member in table.families]] = table.volumes
    return values, np.isfinite(values).any(axis=2), tuple(ids), structures


def _source(root: Origin, images: list[_Image]) -> dict[str, Any]:
    origins = [root, *(image.origin for image in images)]
    digests = {member: sha for origin in origins for member, sha in origin.sha256.items()}
    there = {member for image in images for member in image.table.families}
    return {
        "kind": "bids_varaug",
        "ensemble": next((origin.ensemble for origin in origins if origin.ensemble), None),
        "ensemble_version": next((origin.version for origin in origins if origin.version), None),
        "bids_varaug": root.tool_version,
        "sloppy": root.sloppy,
        "sha256": {member: sha for member, sha in digests.items() if member in there},
    }
