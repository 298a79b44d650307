"""Large tables of numbers, read fast: 300 MB in seconds, and nothing amiss goes unseen."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from bids_varaug.inputs.tables import (
    MISSING,
    TableError,
    check_header,
    encoding_of,
    separator_of,
)

_BLOCK = 1 << 24  # bytes
_BLANK = b" \r\n\0"  # of UTF-16, every other byte of a blank line is 0


def read_header(path: Path) -> tuple[str, ...]:
    """Names of the columns.

    Raises
    ------
    TableError
        If the table cannot be read, is empty, or `check_header` refuses.
    """
    try:
        with path.open("rb") as stream:
            block = stream.read(_BLOCK)
    except OSError as error:
        raise TableError(f"{path}: cannot read it: {error.strerror}.") from error
    text = block.decode(encoding_of(block), errors="replace")
    line = re.split(r"\r\n|\n|\r", text, maxsplit=1)[0]
    if not line.strip():
        raise TableError(f"{path}: is empty, or does not begin with a line of column names.")
    columns = tuple(name.strip().strip('"').strip() for name in line.split(separator_of(path)))
    check_header(path, columns)
    return columns


def check_shape(path: Path, columns: Sequence[str]) -> None:
    """Refuse lines with too few or too many fields; pandas fills up or cuts them without a word.

    Raises
    ------
    TableError
        With the number of the first such line.
    """
    number, rest, end = 1, b"", b""
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            end = end or (b"\n" if b"\n" in block else b"\r")
            whole, found, rest = (rest + block).rpartition(end)
            number += _check_lines(path, whole + found, end, number, columns)
    if rest.strip(_BLANK):
        _check_lines(path, rest + end, end, number, columns)


def _check_lines(path: Path, data: bytes, end: bytes, number: int, columns: Sequence[str]) -> int:
    """Check whole lines, of which the first is that of this number; return how many there are."""
    values = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(values == ord(end))
    separators = np.flatnonzero(values == ord(separator_of(path)))
    counts = np.diff(np.searchsorted(separators, ends), prepend=0)
    for line in np.flatnonzero(counts != len(columns) - 1):
        start = ends[line - 1] + 1 if line else 0
        if data[start : ends[line]].strip(_BLANK):
            raise TableError(
                f"{path}: line {number + line} has {counts[line] + 1} fields, the header "
                f"{len(columns)}. The table is damaged or truncated; write it anew, with n/a for "
                "missing values."
            )
    return len(ends)


def read_columns(
    path: Path, columns: Sequence[str], labels: Sequence[str], features: Sequence[str] | None
) -> pd.DataFrame:
    """Read columns: labels as text, others as pandas takes them, to the last bit of a float64.

    Parameters
    ----------
    path : of a table that passed `check_shape`
    columns : of its header
    labels : columns of text
    features : others to read; default: all

    Raises
    ------
    TableError
        If it cannot be read, or has no rows.
    """
    with path.open("rb") as stream:
        encoding = encoding_of(stream.read(_BLOCK))
    wanted = range(len(columns))
    if features is not None:
        needed = {*labels, *features}
        wanted = [at for at, name in enumerate(columns) if name in needed]
    try:
        with warnings.catch_warnings():
            # Columns of numbers and text are the caller's business.
            warnings.simplefilter("ignore", pd.errors.DtypeWarning)
            table = pd.read_csv(
                path,
                sep=separator_of(path),
                header=None,
                skiprows=1,
                names=range(len(columns)),
                usecols=list(wanted),
                index_col=False,
                dtype={columns.index(name): str for name in labels},
                encoding=encoding,
                keep_default_na=False,
                na_values=list(MISSING),
                float_precision="round_trip",
            )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeError, OSError) as error:
        raise TableError(f"{path}: damaged: {error}. Write it anew.") from error
    if not len(table):
        raise TableError(f"{path}: has column names but no rows.")
    return table.rename(columns=dict(enumerate(columns)))
