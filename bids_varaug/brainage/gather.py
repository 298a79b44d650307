"""Gather what the participant level left into a cohort."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bids_varaug.brainage.cohort import Cohort, Gathered, assemble
from bids_varaug.derivatives import names, provenance
from bids_varaug.derivatives.io import ENDING, MorphError, MorphTable, read_morph
from bids_varaug.derivatives.names import prefix_of
from bids_varaug.derivatives.provenance import MixedDerivativesError, Origin
from bids_varaug.errors import NoInputError
from bids_varaug.inputs.matching import look_up_people, match_people
from bids_varaug.inputs.participants import People
from bids_varaug.inputs.scans import natural_key
from bids_varaug.inputs.tables import some

UNIT = "mm3"


@dataclass(frozen=True, eq=False)
class _Image:
    """A table, the entities of its image, and who made it."""

    ids: tuple[str, str | None, str]  # participant, session, observation
    table: MorphTable
    origin: Origin


def gather_cohort(
    output_dir: Path, people: People, *, features: Sequence[str] | None = None, require_age: bool = True,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Cohort:  # fmt: skip
    """Read the volumes of every image by every member (``*_desc-members_morph.tsv``).

    A feature is the volume of a structure in mm3. All perturbed members count alike, whether training (mca, seed) or
    inference (rr) was perturbed. Images that are damaged, truncated, lack members that most others have, or belong to
    people without age or not in participants.tsv are left out, each with a reason; so are people who have no image.

    `features` and `require_age` are as of `assemble`; `progress` wraps the list of files, such as ``tqdm``. The
    `source` of the cohort (JSON types) has "kind" ("bids_varaug"), "ensemble", "ensemble_version", "bids_varaug" (its
    version), "sloppy", "sha256" by member, "families" (ids of the used perturbed members by family), "notes" (on ids
    that participants.tsv spells differently); and what `assemble` adds.

    A NoInputError says that this is no output of the participant level, or has no such table; a MixedDerivativesError
    lists what was not made by one ensemble and version, as far as can be told; a CohortError says that nobody is left.
    """
    output_dir = Path(output_dir)
    root = provenance.read_root(output_dir)
    files = [path for sub in ("sub-*/anat", "sub-*/ses-*/anat") for path in output_dir.glob(f"{sub}/sub-*{ENDING}")]
    if not files:
        raise NoInputError(f"{output_dir}: no sub-*/[ses-*/]anat/*{ENDING}. Run the participant level first.")
    files.sort(key=lambda path: (natural_key(path.name), path.name))
    left_out: dict[str, str] = {}
    images = _read_images(progress(files), output_dir, left_out)
    origins = [root, *(image.origin for image in images)]
    _check_origins(origins, images)
    images = _same_structures(images, left_out)
    notes: list[str] = []
    there = {path.relative_to(output_dir).parts[0]: None for path in files}
    sessions = {part for path in files for part in path.parent.parts[-2:-1] if part.startswith("ses-")}
    same = match_people(people, there, sessions, output_dir.name, notes)
    without = set(people.participants) - {same.get(p, p) for p in there}
    left_out |= {p: f"no *{ENDING}: the participant level gave nothing" for p in people.participants if p in without}
    ids = ["participant_id", "session_id", "observation"]
    frame = pd.DataFrame([image.ids for image in images], columns=ids, dtype=object)
    frame, age_reasons = look_up_people(frame, people, same)
    found = Gathered(frame, *_stacked([image.table for image in images]), left_out, age_reasons)
    family_of = {member: family for image in images for member, family in image.table.families.items()}
    digests = {member: sha for origin in origins for member, sha in origin.sha256.items()}
    source = {
        "kind": "bids_varaug",
        "ensemble": next((origin.ensemble for origin in origins if origin.ensemble), None),
        "ensemble_version": next((origin.version for origin in origins if origin.version), None),
        "bids_varaug": root.tool_version,
        "sloppy": root.sloppy,
        "sha256": {member: sha for member, sha in digests.items() if member in family_of},
        "notes": notes,
    }
    cohort = assemble(found, source, UNIT, features=features, require_age=require_age)
    families: dict[str, list[str]] = {}
    for member in cohort.member_ids:
        families.setdefault(family_of[member], []).append(member)
    return replace(cohort, source=cohort.source | {"families": families})


def _read_images(files: Iterable[Path], output_dir: Path, left_out: dict[str, str]) -> list[_Image]:
    images = []
    for path in files:
        relative = path.relative_to(output_dir)
        folders, observation = relative.parts[:-2], prefix_of(path.name)
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
        except (MorphError, OSError) as error:
            why = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else error
            left_out[observation] = f"{relative}: {why}"
            continue
        ids = (folders[0], folders[1] if len(folders) > 1 else None, observation)
        images.append(_Image(ids, table, provenance.sidecar_origin(sidecar, observation)))
    return images


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise MorphError(f"its sidecar is damaged ({error})") from error
    return content if isinstance(content, dict) else {}


def _check_origins(origins: Sequence[Origin], images: list[_Image]) -> None:
    """Refuse a mixture of ensembles, versions or settings."""
    provenance.check_same_origin(origins)
    known = set().union(*(origin.sha256 for origin in origins))
    strangers = {image.ids[2]: [m for m in image.table.families if m not in known] for image in images}
    listed = [f"{name} ({some(members)})" for name, members in strangers.items() if members]
    if listed:
        raise MixedDerivativesError(
            f"made by members that neither {names.DESCRIPTIONS_TABLE} nor any sidecar knows: {some(listed, '; ')}. "
            "They come from another ensemble or run; give each ensemble an output directory of its own."
        )


def _same_structures(images: list[_Image], left_out: dict[str, str]) -> list[_Image]:
    """Leave out images that lack structures; refuse those that have others."""
    counts = Counter(image.table.structures for image in images)
    usual = max(counts, key=lambda structures: (counts[structures], len(structures)), default=())
    strange = [image.ids[2] for image in images if set(image.table.structures) - set(usual)]
    if strange:
        raise MixedDerivativesError(
            f"other structures than in the other {len(images) - len(strange)} images: {some(strange)}. They come from "
            "another ensemble; give each ensemble an output directory of its own."
        )
    for image in images:
        if image.table.structures != usual:
            lacking = [name for index, name in usual if (index, name) not in image.table.structures]
            why = f"is truncated: {some(lacking)} missing" if lacking else "has another order of rows"
            left_out[image.ids[2]] = why
    return [image for image in images if image.table.structures == usual]


def _stacked(tables: list[MorphTable]) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """Values, which members are present, their ids, and names of the structures."""
    most_first = sorted(tables, key=lambda table: -len(table.families))
    ids = list(dict.fromkeys(member for table in most_first for member in table.families))
    structures = tuple(name for _, name in tables[0].structures) if tables else ()
    values = np.full((len(tables), len(ids), len(structures)), np.nan)
    for row, table in enumerate(tables):
        values[row, [ids.index(member) for member in table.families]] = table.volumes
    return values, np.isfinite(values).any(axis=2), tuple(ids), structures
