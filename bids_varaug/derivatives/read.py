"""Tables that the participant level wrote, read again; truncated or damaged ones are told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from bids_varaug.derivatives.names import OUTPUTS
from bids_varaug.errors import UserError

ENDING = OUTPUTS["members_tsv"].name("")
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
            raise MorphError(
                f"is truncated or damaged: the structures of the members differ (of {members[0]} {n}, of {member} "
                f"{other} rows)"
            )
    if list(members) != [m for m in counts for _ in range(n)] or pairs != pairs[:n] * len(counts):
        raise MorphError("is damaged: rows of a member do not stand together, or its structures are not the others'")
    if len(set(pairs[:n])) < n:
        raise MorphError(f"member {members[0]} has a structure twice")
    if not (values >= 0).all() or np.isinf(values).any():
        raise MorphError("a volume is missing, negative or infinite")
    if not values.reshape(-1, n).any(axis=1).all():
        raise MorphError("all volumes of a member are 0: it found no brain")
    return MorphTable(dict(zip(members, families, strict=True)), tuple(pairs[:n]), values.reshape(-1, n))


def read_regions(output_dir: Path, observations: Mapping[str, str] | None = None) -> dict[str, dict[str, float]]:
    """Minimum Dice and verdicts from the participant level's tables: measure -> structure -> value.

    dice_min is a mean over participants (of the mean over their images), and falls as members are added; unreliable is
    the share of the images whose volume has this verdict, absent in tables of older versions. `observations` are the
    entities of the images that count (``sub-01_ses-1``) to their participant; default all.
    """
    ending, wanted = OUTPUTS["regions_tsv"].name(""), ("name", "dice_min", "verdict")
    tables = []
    for path in sorted(Path(output_dir).glob(f"sub-*/**/*{ending}")):
        prefix = path.name.removesuffix(ending)
        if observations is not None and prefix not in observations:
            continue
        participant = observations[prefix] if observations else prefix.split("_")[0]
        try:
            table = pd.read_csv(path, sep="\t", na_values="n/a", usecols=lambda c: c in wanted)
            if not {"name", "dice_min"} <= set(table):
                raise ValueError(f"it has {', '.join(table)}")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: cannot be read as a table with columns name and dice_min ({error}). "
                "Run the participant level again for this image."
            ) from error
        tables.append(table.assign(participant=participant))
    if not tables:
        return {}
    table = pd.concat(tables)
    per_person = table.groupby(["name", "participant"], sort=False)["dice_min"].mean()
    found = {"dice_min": per_person.groupby("name", sort=False).mean().dropna().to_dict()}
    if "verdict" in table:
        judged = table.dropna(subset="verdict")
        found["unreliable"] = judged["verdict"].eq("unreliable").groupby(judged["name"], sort=False).mean().to_dict()
    return found
