"""Further columns of participants.tsv, or of a table of features: conditions, targets, covariates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from bids_varaug.errors import UsageError
from bids_varaug.inputs.participants import prefixed
from bids_varaug.inputs.tables import TableError, find_column, read_columns, read_header, some

PARTICIPANT_COLUMNS = ("participant_id", "participant", "subject_id", "subject", "sub", "subjid", "id")
"""Names, in any case, of the column of participants."""


def read_variables(path: Path) -> pd.DataFrame:
    """Columns of a table by participant (``sub-01``), as numbers where a column holds nothing else.

    The participants stand in the column of a usual name, else in the first. Raises `TableError` as
    `inputs.tables.read_columns`, and where somebody has no id.
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
