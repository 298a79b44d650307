"""HTML from the package's templates: pages, tables, and how numbers are written."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd

from bids_varaug.derivatives.citation import template_environment


def render_page(template: str, **values: Any) -> str:
    """Fill a template of ``data/templates``; every value is escaped, none may be missing."""
    environment = template_environment(autoescape=True)
    environment.filters |= {
        "fixed": lambda value, digits=2: f"{value:,.{digits}f}",
        "general": lambda value: f"{value:.3g}",
        "p": p_text,
        "percent": percent,
        "plain": plain,
        "signed": signed,
    }
    return environment.get_template(template).render(**values)


def data_uri(content: bytes | str, kind: str) -> str:
    """Content of an image as an address that stands in the page; `kind` is "png" or "svg+xml"."""
    content = content.encode() if isinstance(content, str) else content
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes
    ----------
    heading, tooltip : what it is called, and what that means
    form : of numbers, a format or a name in `FORMS`; of text, the class of its cells: "text",
        "text long" (may be broken into lines), "text hash"
    order : texts in the order in which they are sorted; alphabetically if empty
    """

    heading: str
    tooltip: str = ""
    form: str = "{:.2f}"
    order: Sequence[str] = ()

    @property
    def is_text(self) -> bool:
        """Whether its cells hold text."""
        return self.form.startswith("text")

    def cell(self, value: Any) -> dict[str, str]:
        """Text, sort key and class of one cell."""
        if self.is_text or isinstance(value, str):
            text = "" if pd.isna(value) else str(value)
            key = str(self.order.index(text)) if text in self.order else text
            return {"text": text, "key": key, "class": self.form if self.is_text else "text"}
        if pd.isna(value):
            return {"text": "n/a", "key": "", "class": ""}
        write = FORMS.get(self.form, self.form.format)
        text = "∞" if np.isinf(value) else write(float(value)).replace("-", "−")
        return {"text": text, "key": repr(float(value)), "class": ""}


@lru_cache(maxsize=1)
def _all_columns() -> dict[str, dict[str, Column]]:
    path = files("bids_varaug") / "data" / "templates" / "columns.tsv"
    with path.open(encoding="utf-8") as stream:
        rows = pd.read_csv(stream, sep="\t", dtype=str, keep_default_na=False)
    return {
        str(table): {row.column: Column(row.heading, row.tooltip, row.form) for row in group.itertuples()}
        for table, group in rows.groupby("table")
    }


def table_columns(table: str) -> dict[str, Column]:
    """Columns of one of the reports' tables in ``data/templates/columns.tsv``, in the order shown."""
    return dict(_all_columns()[table])


def tabulate(
    table: pd.DataFrame, columns: Mapping[str, Column], row_classes: Iterable[str] | None = None
) -> dict[str, Any]:
    """Headings and rows of a table as ``parts.table`` of the templates takes them.

    Parameters
    ----------
    table : columns without a `Column`, and those of numbers of which none is known, are left out
    columns : name to `Column`, in the order shown
    row_classes : class of each row, "" for none
    """
    shown = {
        name: column
        for name, column in columns.items()
        if name in table.columns and (column.is_text or table.empty or table[name].notna().any())
    }
    rows = [
        {"class": class_, "cells": [column.cell(row[name]) for name, column in shown.items()]}
        for class_, row in zip(row_classes or [""] * len(table), table.to_dict("records"), strict=True)
    ]
    headings = [
        {"heading": c.heading, "tooltip": c.tooltip, "class": "text" if c.is_text else ""} for c in shown.values()
    ]
    return {"columns": headings, "rows": rows}


def plain(value: Any) -> str:
    """A setting as a reader writes it.

    Examples
    --------
    >>> plain(("mca", "seed")), plain(True), plain(None), plain({"C": 0.5})
    ('mca, seed', 'yes', '–', 'C: 0.5')
    """
    if value in (None, (), {}, []):
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(part) for part in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(part)}" for key, part in value.items())
    return str(value)


def percent(share: float) -> str:
    """Share as a whole percentage.

    Examples
    --------
    >>> percent(0.9)
    '90 %'
    """
    return f"{100 * share:.0f} %"


def signed(value: float) -> str:
    """Number with sign and two decimals (three where two would be 0.00), a true minus.

    Examples
    --------
    >>> signed(0.314), signed(-0.0042), signed(0.0)
    ('+0.31', '−0.004', '+0.00')
    """
    digits = 3 if 0 < abs(value) < 0.005 else 2
    return f"{value:+.{digits}f}".replace("-", "−")


def p_text(p_value: float | None) -> str:
    """P-value as it is written after the letter p.

    Examples
    --------
    >>> p_text(0.0002), p_text(0.034)
    ('< 0.001', '= 0.034')
    """
    if pd.isna(p_value):
        return "n/a"
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"


FORMS = {
    "p": lambda value: p_text(value).removeprefix("= "),
    "percent": lambda share: f"{100 * share:.2f}",
    "signed": signed,
    "volume": lambda value: f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}",
}
