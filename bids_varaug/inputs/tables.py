"""Tables as people write them: tabs or commas, any line end, quotes, several encodings.

Small ones are read as text; large ones of numbers fast, 300 MB in seconds. Neither reader lets damage pass unseen.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from bids_varaug.errors import UsageError, UserError

MISSING = ("n/a", "", "N/A", "NA", "na", "NaN", "nan", "NAN", "NULL", "null", "None", "none", "#N/A")
"""Spellings of a missing value: BIDS's own first, then those of R, Excel, pandas and databases."""
SHOWN = 8  # names or lines that a message lists before it says how many more there are
_BLOCK = 1 << 24  # bytes that tell the encoding


class TableError(UserError):
    """A table is damaged or lacks what is needed."""


def read_text_table(path: Path) -> pd.DataFrame:
    """Read a table such as participants.tsv whole, as text without quotes and surrounding blanks; None where missing.

    It may be UTF-8 with or without byte order mark, UTF-16 with one, else it is taken for Latin-1; lines end in LF,
    CRLF or CR; fields are separated by tabs (by commas in a file called .csv). Raises `TableError` as `read_header`
    does, and if a line has too few or too many fields.
    """
    columns = read_header(path)
    lines = _data_lines(path, columns)
    rows = [[None if field in MISSING else field for field in _fields(path, line)] for line in lines]
    return pd.DataFrame(rows, columns=list(columns), dtype=object)


def read_columns(path: Path, text: Sequence[str], numbers: Sequence[str] | None) -> pd.DataFrame:
    """Read columns of a large table: some as text, others (default: all) as pandas takes them, to the last bit.

    Raises `TableError` as `read_text_table` does, and if there are no rows.
    """
    columns = read_header(path)
    for _ in _data_lines(path, columns):  # pandas fills up or cuts them without a word
        pass
    needed = {*text, *(columns if numbers is None else numbers)}
    try:
        table = pd.read_csv(
            path, sep=_separator(path), header=0, names=range(len(columns)), index_col=False,
            usecols=[at for at, name in enumerate(columns) if name in needed],
            dtype={columns.index(name): str for name in text}, encoding=_encoding(path), keep_default_na=False,
            na_values=list(MISSING), float_precision="round_trip", low_memory=False,
        )  # fmt: skip
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeError, OSError) as error:
        raise TableError(f"{path}: damaged: {error}. Export it again.") from error
    if not len(table):
        raise TableError(f"{path}: has column names but no rows.")
    return table.rename(columns=dict(enumerate(columns)))


def read_header(path: Path) -> tuple[str, ...]:
    """Names of the columns of a table.

    Raises `TableError` if it cannot be read, is empty, has two columns of the same name, or other separators than its
    own name promises.
    """
    line = next(_lines(path), "")
    if not line.strip():
        raise TableError(f"{path}: is empty, or does not begin with a line of column names.")
    columns = _fields(path, line)
    if twice := sorted({name for name in columns if name and columns.count(name) > 1}):
        raise TableError(f"{path}: column {some(twice)} appears twice. Rename or remove one of them.")
    if _separator(path) == "\t" and (other := re.search(r"[,;]", line)) and len(columns) == 1:
        seen = f"fields seem to be separated by {other[0]!r}"
        raise TableError(f"{path}: {seen}. A .tsv file needs tabs; export it again.")
    return tuple(columns)


def find_column(columns: Sequence[str], wanted: str, usual: Sequence[str] = ()) -> str | None:
    """Name, as the table spells it, of the column that is meant; None where there is none.

    Looked for in this order: the very name; its `plain_name`; then those of the usual names, in their order.

    >>> find_column(["participant_id", "Scan Site"], "site", ["scan_site"])
    'Scan Site'
    """
    if wanted in columns:
        return wanted
    plain = {plain_name(name): name for name in reversed(columns)}  # of equals, the first
    return next((plain[name] for name in map(plain_name, (wanted, *usual)) if name in plain), None)


def plain_name(name: str) -> str:
    """Name without case, accents, blanks and punctuation.

    >>> plain_name("Scanner_Site"), plain_name("Age (years)")
    ('scannersite', 'ageyears')
    """
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKD", name)).lower()


def prefixed(label: str, entity: str = "sub") -> str:
    """Label with its prefix, in small letters.

    >>> prefixed("01"), prefixed("SUB-01"), prefixed("1", "ses")
    ('sub-01', 'sub-01', 'ses-1')
    """
    return f"{entity}-{re.sub(f'^{entity}-', '', label, flags=re.IGNORECASE)}"


def some(names: Sequence[str], separator: str = ", ", shown: int = SHOWN) -> str:
    """First names of a list, and how many more there are, for a message.

    >>> some(["a", "b"]), some(list("abcdefghij"), " ")
    ('a, b', 'a b c d e f g h and 2 more')
    """
    names = list(names)
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return separator.join(names[:shown]) + rest


def by_reason(left_out: Mapping[str, str]) -> dict[str, list[str]]:
    """Names by why they were left out.

    >>> by_reason({"sub-1": "no age", "sub-2": "damaged", "sub-3": "no age"})
    {'no age': ['sub-1', 'sub-3'], 'damaged': ['sub-2']}
    """
    found: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        found.setdefault(reason, []).append(name)
    return found


def _data_lines(path: Path, columns: Sequence[str]) -> Iterator[str]:
    """Lines below the header, without blank ones; all must have as many fields as the header."""
    wrong = []
    for number, line in enumerate(_lines(path), start=1):
        if number == 1 or not line.strip():
            continue
        yield line
        if (count := line.count(_separator(path)) + 1) != len(columns):
            wrong.append(f"line {number} has {count}")
    if wrong:
        raise TableError(
            f"{path}: the header has {len(columns)} fields, but {some(wrong, '; ')}. The file is damaged or truncated; "
            "export it again, with one separator between fields and n/a for missing values."
        )


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding=_encoding(path), errors="replace") as stream:
            yield from stream
    except OSError as error:
        raise TableError(f"{path}: cannot read it: {error.strerror}.") from error


def _encoding(path: Path) -> str:
    """Name of the encoding: by the byte order mark, else UTF-8 where that can be, else Latin-1."""
    with path.open("rb") as stream:
        data = stream.read(_BLOCK)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # Excel's "Unicode text"
        return "utf-16"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)  # its end may cut a character in two
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8-sig"


def _separator(path: Path) -> str:
    return "," if path.suffix.lower() == ".csv" else "\t"


def _fields(path: Path, line: str) -> list[str]:
    # R quotes text by default; a separator inside quotes is not supported, BIDS has none.
    return [field.strip().strip('"').strip() for field in line.split(_separator(path))]


PARTICIPANT_COLUMNS = ("participant_id", "participant", "subject_id", "subject", "sub", "subjid", "id")
"""Names, in any case, of the column of participants."""


def read_variables(path: Path) -> pd.DataFrame:
    """Columns of a table by participant (``sub-01``), as numbers where a column holds nothing else.

    The participants stand in the column of a usual name, else in the first. Raises `TableError` as
    `read_columns`, and where somebody has no id.
    """
    path = Path(path)
    columns = read_header(path)
    column = find_column(columns, PARTICIPANT_COLUMNS[0], PARTICIPANT_COLUMNS) or columns[0]
    table = read_columns(path, [column], None)
    if table[column].isna().any():
        raise TableError(f"{path}: no participant in line {table[column].isna().argmax() + 2}.")
    return table.set_index(pd.Index([prefixed(label.strip()) for label in table[column]], name="participant"))


def participants_where(tables: Sequence[Path], condition: str) -> list[str]:
    """Participants with a row that meets a condition, in the order of the table.

    The condition is a query of pandas over the columns of the first of the tables that has them, such as ``"group ==
    'TD' and age > 18"``. A UsageError says that no table has a column, or that it is no condition.
    """
    lacking = []
    for path in tables:
        table = read_variables(path)
        try:
            rows = table.eval(condition, engine="python")
        except pd.errors.UndefinedVariableError as error:
            lacking.append(f"{path}: {error}. It has: {some(list(table.columns))}.")
            continue
        except (SyntaxError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
            raise UsageError(
                f'--include {condition!r}: cannot be applied to {path} ({error}). Write a condition such as "group == '
                "'TD'\" or \"age > 18 and sex == 'F'\"; quote names with blanks by backticks."
            ) from error
        if not (isinstance(rows, pd.Series) and rows.dtype == bool):
            raise UsageError(
                f"--include {condition!r}: is no condition, true or false of each row. Compare: \"group == 'TD'\"."
            )
        return list(dict.fromkeys(table.index[rows]))
    raise UsageError(f"--include {condition!r}: " + (" ".join(lacking) or "there is no participants.tsv."))
