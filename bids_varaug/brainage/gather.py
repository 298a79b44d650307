"""Gather what the participant level left into a cohort."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from bids_varaug.brainage.assemble import PEOPLE_COLUMNS, Gathered, assemble, nobody_left
from bids_varaug.brainage.cohort import Cohort
from bids_varaug.brainage.features_table import read_features_table
from bids_varaug.brainage.morph import MorphError, MorphLayout, MorphReader
from bids_varaug.brainage.provenance import (
    MixedDerivativesError,
    Origin,
    check_same_origin,
    read_root,
    read_runs,
    sidecar_origin,
)
from bids_varaug.brainage.spellings import match_people
from bids_varaug.derivatives import names
from bids_varaug.errors import NoInputError
from bids_varaug.inputs.participants import People
from bids_varaug.inputs.scans import natural_key
from bids_varaug.inputs.tables import some

__all__ = ["gather_cohort", "read_features_table"]

ENDING = names.OUTPUTS["members_tsv"].name("")
UNIT = "mm3"


@dataclass(frozen=True)
class MorphFile:
    """A table of one T1w image: its place, and the entities of the image."""

    path: str
    participant_id: str
    session_id: str | None
    observation: str


@dataclass(frozen=True, eq=False)
class _Read:
    """A table that could be read."""

    file: MorphFile
    layout: MorphLayout
    volumes: np.ndarray
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

    A feature is the volume of a structure in mm3. All perturbed members count alike, whether
    training (mca, seed) or inference (rr) was perturbed; `source` says which there were. The
    baseline is the member `ieee`; without it, the mean of the members. Images that are damaged,
    truncated, lack members that most others have, or belong to people without age or not in
    participants.tsv are left out, each with a reason; so are people who have no image.

    Parameters
    ----------
    output_dir : Path
        Of the participant level.
    people : People
    features, require_age : as `assemble`
    progress : wraps the list of files, such as ``tqdm``

    Returns
    -------
    Cohort
        Its `source` (JSON types): "kind" ("bids_varaug"), "ensemble", "ensemble_version",
        "bids_varaug" (version), "sloppy", "sha256" by member, "families" (ids of the used
        perturbed members by family), "notes" (on ids that participants.tsv spells differently);
        and what `assemble` adds.

    Raises
    ------
    NoInputError
        If this is no output of the participant level, or has no such table.
    MixedDerivativesError
        If they were not all made by one ensemble and version, as far as that can be told, see
        `provenance`; each is listed.
    CohortError
        If nobody is left.
    """
    output_dir = Path(output_dir)
    root = read_root(output_dir)
    files = find_morph_files(output_dir)
    if not files:
        raise NoInputError(
            f"{output_dir}: no sub-*/[ses-*/]anat/*{ENDING}. Run the participant level first."
        )
    left_out: dict[str, str] = {}
    tables = _read_tables(progress(files), output_dir, left_out)
    runs = _check_origins(root, read_runs(output_dir), tables)
    tables = _same_structures(tables, left_out)
    notes: list[str] = []
    same = match_people(
        people, [file.participant_id for file in files],
        {file.session_id for file in files if file.session_id}, output_dir.name, notes,
    )  # fmt: skip
    _report_absent(people, {same.get(f.participant_id, f.participant_id) for f in files}, left_out)
    found = _gathered(tables, people, same, left_out, require_age, notes)
    source = _source(root, runs, tables) | {"notes": notes}
    cohort = assemble(found, source, UNIT, features=features, require_age=require_age)
    return replace(cohort, source=cohort.source | {"families": _families(cohort, tables)})


def find_morph_files(output_dir: Path) -> list[MorphFile]:
    """Tables below ``sub-*/[ses-*/]anat``, in natural order of their names."""
    files = []
    for subject in _folders(output_dir, "sub-"):
        sessions = [(None, subject)]
        sessions += [(entry.name, entry.path) for entry in _entries(subject) if _is(entry, "ses-")]
        for session, folder in sessions:
            for entry in _entries(os.path.join(folder, "anat")):
                if entry.name.endswith(ENDING) and entry.name.startswith("sub-"):
                    name = entry.name.removesuffix(ENDING)
                    participant = os.path.basename(subject)
                    files.append(MorphFile(entry.path, participant, session, name))
    return sorted(files, key=lambda file: (natural_key(file.observation), file.observation))


def _folders(folder: Path, prefix: str) -> list[str]:
    return [entry.path for entry in _entries(str(folder)) if _is(entry, prefix)]


def _is(entry: os.DirEntry, prefix: str) -> bool:
    return entry.name.startswith(prefix) and entry.is_dir()


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read_tables(files: Iterable[MorphFile], output_dir: Path, left_out) -> list[_Read]:
    reader = MorphReader()
    tables = []
    for file in files:
        relative = os.path.relpath(file.path, output_dir)
        place = "_".join([file.participant_id, *([file.session_id] if file.session_id else [])])
        if not f"{file.observation}_".startswith(f"{place}_"):
            left_out[relative] = f"lies in the folder of {place}, whose name it does not have"
            continue
        try:
            sidecar = _read_json(Path(file.path.removesuffix(".tsv") + ".json"))
            layout, volumes = reader.read(Path(file.path))
        except MorphError as error:
            left_out[file.observation] = f"{relative}: {error}"
            continue
        except OSError as error:
            left_out[file.observation] = f"{relative}: cannot be read ({error.strerror})"
            continue
        named = sidecar.get("Members")
        lacking = [m for m in named if m not in layout.members] if isinstance(named, list) else []
        if lacking:
            left_out[file.observation] = (
                f"{relative}: is truncated: of the members in its sidecar, {some(lacking)} are "
                "missing"
            )
            continue
        tables.append(_Read(file, layout, volumes, sidecar_origin(sidecar, file.observation)))
    return tables


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise MorphError(f"its sidecar is damaged ({error})") from error
    return content if isinstance(content, dict) else {}


def _check_origins(root: Origin, runs: list[Origin], tables: list[_Read]) -> list[Origin]:
    """Refuse a mixture; return what is known besides the root, most telling first."""
    own = [table.origin for table in tables]
    # Where each table says which ensemble made it, logs of runs whose outputs were made again
    # since do not matter.
    telling = bool(own) and all(origin.ensemble and origin.sha256 for origin in own)
    others = own if telling else [*own, *runs]
    check_same_origin([root, *others])
    known = set(root.sha256).union(*(origin.sha256 for origin in others))
    strangers = [
        f"{table.file.observation} ({some([m for m in table.layout.members if m not in known])})"
        for table in tables
        if not known.issuperset(table.layout.members)
    ]
    if strangers:
        raise MixedDerivativesError(
            f"made by members that neither {names.DESCRIPTIONS_TABLE} nor any log knows: "
            f"{some(strangers, '; ')}. They come from another ensemble or run; give each ensemble "
            "an output directory of its own."
        )
    return [origin for origin in others if origin.ensemble]


def _same_structures(tables: list[_Read], left_out) -> list[_Read]:
    """Leave out tables that lack structures; refuse those that have others."""
    if not tables:
        return []
    every: dict[tuple, list[_Read]] = {}
    for table in tables:
        every.setdefault(table.layout.structures, []).append(table)
    usual = max(every, key=lambda structures: (len(every[structures]), len(structures)))
    strange = [
        table.file.observation
        for structures, theirs in every.items()
        if not set(structures) <= set(usual)
        for table in theirs
    ]
    if strange:
        raise MixedDerivativesError(
            f"other structures than in the other {len(tables) - len(strange)} images: "
            f"{some(strange)}. They come from another ensemble; give each ensemble an output "
            "directory of its own."
        )
    for structures, theirs in every.items():
        lacking = [name for index, name in usual if (index, name) not in structures]
        for table in theirs if lacking else ():
            left_out[table.file.observation] = f"is truncated: {some(lacking)} missing"
    return every[usual]


def _report_absent(people: People, there: Collection[str], left_out) -> None:
    for participant in people.participants:
        if participant not in there:
            left_out[participant] = f"no *{ENDING}: the participant level gave nothing"


def _gathered(
    tables: list[_Read], people: People, same: Mapping[str, str], left_out, require_age, notes
) -> Gathered:
    rows, kept, age_reasons = [], [], {}
    for table in tables:
        file = table.file
        person = people.find(
            *(same.get(name, name) for name in (file.participant_id, file.session_id))
        )
        if person is None and require_age:
            who = same.get(file.participant_id, file.participant_id)
            at = f" at {file.session_id or 'no session'}" if who in people.participants else ""
            left_out[file.observation] = f"{file.participant_id} is not in {people.source}{at}"
            continue
        known = (person.age, person.sex, person.site) if person else (np.nan, None, None)
        rows.append((file.participant_id, file.session_id, file.observation, *known))
        kept.append(table)
        if person and np.isnan(person.age):
            age_reasons[file.observation] = person.reason or f"no age in {people.source}"
    if not kept:
        raise nobody_left(left_out, notes)
    ids = list(dict.fromkeys(m for layout in _layouts(kept) for m in layout.members))
    structures = kept[0].layout.structures
    values = np.full((len(kept), len(ids), len(structures)), np.nan)
    present = np.zeros(values.shape[:2], bool)
    columns = {layout: [ids.index(m) for m in layout.members] for layout in _layouts(kept)}
    for row, table in enumerate(kept):
        values[row, columns[table.layout]] = table.volumes
        present[row, columns[table.layout]] = True
    frame = pd.DataFrame(rows, columns=list(PEOPLE_COLUMNS)).astype({"age": "float64"})
    for name in ("participant_id", "session_id", "observation", "sex", "site"):
        frame[name] = pd.Series([row[PEOPLE_COLUMNS.index(name)] for row in rows], dtype=object)
    return Gathered(
        frame, values, present, tuple(ids), tuple(name for _, name in structures), left_out,
        age_reasons,
    )  # fmt: skip


def _layouts(tables: list[_Read]) -> list[MorphLayout]:
    """Layouts that occur, each once, that with most members first."""
    each = dict.fromkeys(table.layout for table in tables)
    return sorted(each, key=lambda layout: -len(layout.members))


def _source(root: Origin, others: list[Origin], tables: list[_Read]) -> dict[str, object]:
    digests = dict(root.sha256)
    for origin in others:
        digests |= origin.sha256
    there = {member for table in tables for member in table.layout.members}
    return {
        "kind": "bids_varaug",
        "ensemble": others[0].ensemble if others else None,
        "ensemble_version": others[0].version if others else None,
        "bids_varaug": root.tool_version,
        "sloppy": root.sloppy,
        "sha256": {member: sha for member, sha in digests.items() if member in there},
    }


def _families(cohort: Cohort, tables: list[_Read]) -> dict[str, list[str]]:
    """Perturbed members that the cohort uses, by family."""
    family_of = {
        member: family
        for layout in _layouts(tables)
        for member, family in zip(layout.members, layout.families, strict=True)
    }
    families: dict[str, list[str]] = {}
    for member in cohort.member_ids:
        families.setdefault(family_of[member], []).append(member)
    return families
