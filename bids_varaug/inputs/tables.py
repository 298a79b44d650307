"""Tables as people write them: tabs or commas, any line end, quotes, several encodings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bids_varaug.errors import UserError

MISSING = (
    "n/a", "", "N/A", "NA", "na", "NaN", "nan", "NAN", "NULL", "null", "None", "none", "#N/A",
)  # fmt: skip
"""Spellings of a missing value: BIDS's own first, then those of R, Excel, pandas and databases."""
SHOWN = 8  # names or lines that a message lists before it says how many more there are


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
        return [None if is_missing(row[at]) else row[at] for row in self.rows]


def is_missing(value: str) -> bool:
    """Whether a value says that there is none."""
    return value in MISSING


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
    try:
        text = decode(path.read_bytes())
    except OSError as error:
        raise TableError(f"{path}: cannot read it: {error.strerror}.") from error
    lines = re.split(r"\r\n|\n|\r", text)
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise TableError(f"{path}: is empty. It needs a line of column names and one for each row.")
    separator = separator_of(path)
    columns = _fields(lines[0], separator)
    check_header(path, columns)
    rows, wrong = [], []
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        fields = _fields(line, separator)
        rows.append(fields)
        if len(fields) != len(columns):
            wrong.append(f"line {number} has {len(fields)}")
    if wrong:
        raise TableError(
            f"{path}: the header has {len(columns)} fields, but {some(wrong, '; ')}. The file is "
            "damaged or truncated; write it anew, with one tab between fields and n/a for missing "
            "values."
        )
    return TextTable(path, tuple(columns), rows)


def check_header(path: Path, columns: Sequence[str]) -> None:
    """Refuse a header with a name twice, or with other separators than the file's name promises.

    Raises
    ------
    TableError
    """
    named = [name for name in columns if name]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise TableError(
            f"{path}: column {some(twice)} is there twice. Rename or remove one of them."
        )
    if len(columns) == 1 and separator_of(path) == "\t" and re.search(r"[,;]", columns[0]):
        raise TableError(
            f"{path}: fields seem to be separated by {re.search(r'[,;]', columns[0])[0]!r}. A .tsv "
            "file needs tabs: save it so."
        )


def separator_of(path: Path) -> str:
    """Tab, or a comma for files called .csv."""
    return "," if Path(path).suffix.lower() == ".csv" else "\t"


def decode(data: bytes) -> str:
    r"""Text of a file whose encoding nobody tells.

    Examples
    --------
    >>> decode(b"\xef\xbb\xbfage"), decode("Besançon".encode("latin-1"))
    ('age', 'Besançon')
    """
    return data.decode(encoding_of(data), errors="replace")


def encoding_of(data: bytes) -> str:
    """Name of the encoding: by the byte order mark, else UTF-8 where that can be, else Latin-1."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):  # Excel's "Unicode text"
        return "utf-16"
    try:
        data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The end of a piece of a long file may cut a character in two.
        if error.reason != "unexpected end of data":
            return "latin-1"
    return "utf-8-sig"


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
    for name in (wanted, *usual):
        if plain_name(name) in plain:
            return plain[plain_name(name)]
    return None


def plain_name(name: str) -> str:
    """Name without case, blanks and punctuation.

    Examples
    --------
    >>> plain_name("Scanner_Site"), plain_name("Age (years)")
    ('scannersite', 'ageyears')
    """
    return re.sub(r"[\W_]+", "", name).lower()


def some(names: Sequence[str], separator: str = ", ") -> str:
    """First names of a list, and how many more there are, for a message.

    Examples
    --------
    >>> some(["a", "b"]), some(list("abcdefghij"), " ")
    ('a, b', 'a b c d e f g h and 2 more')
    """
    names = list(names)
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return separator.join(names[:SHOWN]) + rest


def _fields(line: str, separator: str) -> list[str]:
    # R quotes text by default; a separator inside quotes is not supported, BIDS has none.
    return [field.strip().strip('"').strip() for field in line.split(separator)]
