"""Tables as people write them: tabs or commas, any line end, quotes, several encodings.

Small ones are read as text; large ones of numbers fast, 300 MB in seconds. In both, nothing amiss
goes unseen.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bids_varaug.errors import UserError

MISSING = (
    "n/a", "", "N/A", "NA", "na", "NaN", "nan", "NAN", "NULL", "null", "None", "none", "#N/A",
)  # fmt: skip
"""Spellings of a missing value: BIDS's own first, then those of R, Excel, pandas and databases."""
SHOWN = 8  # names or lines that a message lists before it says how many more there are
_BLOCK = 1 << 24  # bytes that tell the encoding


class TableError(UserError):
    """A table is damaged or lacks what is needed."""


@dataclass(frozen=True)
class TextTable:
    """A small table, all of it text, blanks around values and quotes removed.

    Parameters
    ----------
    path : Path
    columns : tuple of str, unique
    rows : list of list of str, each as long as `columns`
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[list[str]]

    def column(self, name: str) -> list[str | None]:
        """Values of a column; None where missing."""
        at = self.columns.index(name)
        return [None if row[at] in MISSING else row[at] for row in self.rows]


def read_text_table(path: Path) -> TextTable:
    """Read a table such as participants.tsv whole, as text.

    Parameters
    ----------
    path : Path
        UTF-8 with or without byte order mark, UTF-16 with one, else taken for Latin-1; lines end
        in LF, CRLF or CR. Fields are separated by tabs (by commas where the name ends in .csv).

    Raises
    ------
    TableError
        If it cannot be read, is empty, has a line with too few or too many fields, or two columns
        of the same name.
    """
    path = Path(path)
    lines = [(n, _fields(path, line)) for n, line in _lines(path) if n == 1 or line.strip()]
    if not any(any(fields) for _, fields in lines):
        raise TableError(f"{path}: is empty. It needs a line of column names and one for each row.")
    columns = _check_header(path, lines[0][1])
    wrong = [f"line {n} has {len(fields)}" for n, fields in lines if len(fields) != len(columns)]
    if wrong:
        raise TableError(
            f"{path}: the header has {len(columns)} fields, but {some(wrong, '; ')}. The file is "
            "damaged or truncated; write it again, with one tab between fields and n/a for missing "
            "values."
        )
    return TextTable(path, columns, [fields for _, fields in lines[1:]])


def read_header(path: Path) -> tuple[str, ...]:
    """Names of the columns of a large table.

    Raises
    ------
    TableError
        If the table cannot be read, is empty, has two columns of the same name, or other
        separators than its own name promises.
    """
    _, line = next(_lines(path), (1, ""))
    if not line.strip():
        raise TableError(f"{path}: is empty, or does not begin with a line of column names.")
    return _check_header(path, _fields(path, line))


def check_shape(path: Path, columns: Sequence[str]) -> None:
    """Refuse lines with too few or too many fields; pandas fills up or cuts them without a word.

    Raises
    ------
    TableError
        With the number of the first such line.
    """
    separator = _separator(path)
    for number, line in _lines(path):
        count = line.count(separator) + 1
        if count != len(columns) and line.strip(" \n\0"):
            raise TableError(
                f"{path}: line {number} has {count} fields, the header {len(columns)}. The table "
                "is damaged or truncated; write it again, with n/a for missing values."
            )


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
    needed = {*labels, *(columns if features is None else features)}
    try:
        with warnings.catch_warnings():
            # Columns of numbers and text are the caller's business.
            warnings.simplefilter("ignore", pd.errors.DtypeWarning)
            table = pd.read_csv(
                path,
                sep=_separator(path),
                header=None,
                skiprows=1,
                names=range(len(columns)),
                usecols=[at for at, name in enumerate(columns) if name in needed],
                index_col=False,
                dtype={columns.index(name): str for name in labels},
                encoding=_encoding(path),
                keep_default_na=False,
                na_values=list(MISSING),
                float_precision="round_trip",
            )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeError, OSError) as error:
        raise TableError(f"{path}: damaged: {error}. Write it again.") from error
    if not len(table):
        raise TableError(f"{path}: has column names but no rows.")
    return table.rename(columns=dict(enumerate(columns)))


def find_column(columns: Sequence[str], wanted: str, usual: Sequence[str] = ()) -> str | None:
    """Name, as the table spells it, of the column that is meant; None where there is none.

    Looked for in this order: the very name; the name in any case, blanks and underscores left out;
    then the usual names, in the same way, in their order.

    Examples
    --------
    >>> find_column(["participant_id", "Scan Site"], "site", ["scan_site"])
    'Scan Site'
    """
    if wanted in columns:
        return wanted
    plain = {plain_name(name): name for name in reversed(columns)}  # of equals, the first
    return next((plain[name] for name in map(plain_name, (wanted, *usual)) if name in plain), None)


def plain_name(name: str) -> str:
    """Name without case, accents, blanks and punctuation.

    Examples
    --------
    >>> plain_name("Scanner_Site"), plain_name("Age (years)")
    ('scannersite', 'ageyears')
    """
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKD", name)).lower()


def some(names: Sequence[str], separator: str = ", ", shown: int = SHOWN) -> str:
    """First names of a list, and how many more there are, for a message.

    Examples
    --------
    >>> some(["a", "b"]), some(list("abcdefghij"), " ")
    ('a, b', 'a b c d e f g h and 2 more')
    """
    names = list(names)
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return separator.join(names[:shown]) + rest


def _check_header(path: Path, columns: list[str]) -> tuple[str, ...]:
    """Refuse a header with a name twice, or with other separators than the file's name promises."""
    named = [name for name in columns if name]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise TableError(
            f"{path}: column {some(twice)} is there twice. Rename or remove one of them."
        )
    if len(columns) == 1 and _separator(path) == "\t" and re.search(r"[,;]", columns[0]):
        raise TableError(
            f"{path}: fields seem to be separated by {re.search(r'[,;]', columns[0])[0]!r}. A .tsv "
            "file needs tabs: save it so."
        )
    return tuple(columns)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line, from 1."""
    try:
        with path.open(encoding=_encoding(path), errors="replace") as stream:
            yield from enumerate(stream, start=1)
    except OSError as error:
        raise TableError(f"{path}: cannot read it: {error.strerror}.") from error


def _encoding(path: Path) -> str:
    """Name of the encoding: by the byte order mark, else UTF-8 where that can be, else Latin-1."""
    with path.open("rb") as stream:
        data = stream.read(_BLOCK)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):  # Excel's "Unicode text"
        return "utf-16"
    try:
        data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The end of a piece of a long file may cut a character in two.
        if error.reason != "unexpected end of data":
            return "latin-1"
    return "utf-8-sig"


def _separator(path: Path) -> str:
    """Tab, or a comma for files called .csv."""
    return "," if path.suffix.lower() == ".csv" else "\t"


def _fields(path: Path, line: str) -> list[str]:
    # R quotes text by default; a separator inside quotes is not supported, BIDS has none.
    return [field.strip().strip('"').strip() for field in line.split(_separator(path))]
