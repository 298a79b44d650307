"""Reading ``*_desc-members_morph.tsv``: the volumes of one image by every member."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

COLUMNS = (b"member", b"family", b"index", b"name", b"volume")
_WIDTH = len(COLUMNS)


class MorphError(ValueError):
    """A table is damaged; the message says how, without the file's name."""


@dataclass(frozen=True, eq=False)
class MorphLayout:
    """What all tables of an ensemble share.

    Parameters
    ----------
    members, families : of the M members, in the file's order
    structures : of the K structures: (index, name), in the file's order
    keys : the first four fields of each row, as bytes, M x K rows
    """

    members: tuple[str, ...]
    families: tuple[str, ...]
    structures: tuple[tuple[int, str], ...]
    keys: tuple[list[bytes], ...]


class MorphReader:
    """Reads many tables, most of which have the same rows but for the volumes.

    A table whose rows are those of an earlier one is a split and a conversion of numbers (0.4 ms
    for 22 members x 31 structures); any other is checked row by row.
    """

    def __init__(self) -> None:
        self._layouts: list[MorphLayout] = []

    def read(self, path: Path) -> tuple[MorphLayout, np.ndarray]:
        """Layout, and volumes (M, K) float64 in mm3.

        Raises
        ------
        MorphError
            If the table is truncated or damaged: another header, a line with too few or too many
            fields, no line end at the end, a structure that only some members have, a row twice, a
            volume that is no number or negative.
        OSError
            If it cannot be read.
        """
        data = path.read_bytes()
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        data = data.removeprefix(b"\xef\xbb\xbf")
        if data.startswith(b"/annex/objects/"):
            raise MorphError("its content was not fetched (git-annex): datalad get it")
        if not data.strip():
            raise MorphError("is empty")
        if not data.endswith(b"\n"):
            raise MorphError("is truncated: its last line has no end")
        fields = data.replace(b"\n", b"\t").split(b"\t")
        if tuple(fields[:_WIDTH]) != COLUMNS:
            raise MorphError("has not the columns member, family, index, name, volume")
        layout = self._known_layout(fields, data.count(b"\n") - 1)
        if layout is None:
            layout = parse_layout(data)
            self._layouts.append(layout)
        volumes = _numbers(fields[_WIDTH + 4 : -1 : _WIDTH])
        return layout, volumes.reshape(len(layout.members), len(layout.structures))

    def _known_layout(self, fields: list[bytes], n_rows: int) -> MorphLayout | None:
        # After the last line end, split leaves an empty field.
        if len(fields) != _WIDTH * (n_rows + 1) + 1:
            return None
        keys = tuple(fields[_WIDTH + column : -1 : _WIDTH] for column in range(4))
        return next((layout for layout in self._layouts if layout.keys == keys), None)


def parse_layout(data: bytes) -> MorphLayout:
    """Check a table row by row.

    Raises
    ------
    MorphError
        As `MorphReader.read`.
    """
    rows = [line.split(b"\t") for line in data[:-1].split(b"\n")[1:]]
    wrong = [number for number, row in enumerate(rows, start=2) if len(row) != _WIDTH]
    if wrong:
        raise MorphError(f"line {wrong[0]} has {len(rows[wrong[0] - 2])} fields, not {_WIDTH}")
    if not rows:
        raise MorphError("has no rows")
    families: dict[str, str] = {}
    structures: dict[str, list[tuple[int, str]]] = {}
    for member, family, index, name, _ in rows:
        try:
            structure = int(index), name.decode()
            families[member.decode()] = family.decode()
        except ValueError as error:
            raise MorphError(f"a row cannot be read ({error})") from error
        structures.setdefault(member.decode(), []).append(structure)
    first = next(iter(structures.values()))
    if len(set(first)) < len(first):
        raise MorphError(f"member {next(iter(structures))} has a structure twice")
    for member, theirs in structures.items():
        if theirs != first:
            raise MorphError(
                "is truncated or damaged: the structures of the members differ (of "
                f"{next(iter(structures))} {len(first)}, of {member} {len(theirs)} rows)"
            )
    keys = tuple([row[column] for row in rows] for column in range(4))
    members = tuple(structures)
    if keys[0] != [member.encode() for member in members for _ in first]:
        raise MorphError("rows of a member do not stand together")
    return MorphLayout(members, tuple(families.values()), tuple(first), keys)


def _numbers(fields: list[bytes]) -> np.ndarray:
    try:
        volumes = np.array(fields).astype(np.float64)
    except ValueError as error:
        raise MorphError(f"a volume is no number ({error})") from error
    if not (volumes >= 0).all() or np.isinf(volumes).any():
        raise MorphError("a volume is missing, negative or infinite")
    return volumes
