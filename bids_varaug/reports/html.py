"""HTML from the package's templates: pages, tables, and how numbers are written."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bids_varaug.derivatives.citation import render
from bids_varaug.derivatives.names import Column
from bids_varaug.inputs.tables import by_reason, some


def render_page(template: str, **values: Any) -> str:
    """Fill a template of ``data/templates``; every value is escaped, none may be missing."""
    return render(template, FILTERS, **values)


def run_id(*made_of: Any) -> str:
    """Eight digits that are equal where what a run is made of is equal.

    >>> run_id({"a": 1}, "b") == run_id({"a": 1}, "b") != run_id({"a": 2}, "b")
    True
    """
    return hashlib.sha256(json.dumps(made_of, default=str).encode()).hexdigest()[:8]


def data_uri(content: bytes | str, kind: str) -> str:
    """Content of an image as an address that stands in the page; `kind` is "png" or "svg+xml"."""
    content = content.encode() if isinstance(content, str) else content
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


def tabulate(
    table: pd.DataFrame,
    columns: Mapping[str, Column],
    row_classes: Iterable[str] | None = None,
    orders: Mapping[str, Sequence[str]] | None = None,
    links: Mapping[str, Sequence[Mapping[str, str]]] | None = None,
) -> dict[str, Any]:
    """Headings and rows of a table as ``parts.table`` of the templates takes them.

    Columns without a `Column`, and those of numbers of which none is known, are left out. The form of a `Column` is of
    numbers a format or a name in `FORMS`, of text the class of its cells: "text", "text long" (may be broken into
    lines), "text hash". `orders` gives a column's texts in the order in which they are sorted, where that is not
    alphabetical; `links` where each of its cells leads: its address as "href", for the viewer a structure's "index" and
    "at" in mm, nothing for none.
    """
    shown = {
        name: column
        for name, column in columns.items()
        if name in table.columns and (_is_text(column) or table.empty or table[name].notna().any())
    }
    orders = orders or {}
    rows: list[dict[str, Any]] = [
        {"class": class_, "cells": [_cell(row[name], c, orders.get(name, ())) for name, c in shown.items()]}
        for class_, row in zip(row_classes or [""] * len(table), table.to_dict("records"), strict=True)
    ]
    for name, addresses in (links or {}).items():
        for row, address in zip(rows, addresses, strict=True):
            row["cells"][list(shown).index(name)] |= address
    headings = [
        {"heading": c.heading, "tooltip": c.description, "class": "text" if _is_text(c) else ""} for c in shown.values()
    ]
    return {"columns": headings, "rows": rows}


def _is_text(column: Column) -> bool:
    return column.form.startswith("text")


def _cell(value: Any, column: Column, order: Sequence[str]) -> dict[str, str]:
    """Text, sort key and class of one cell."""
    if _is_text(column) or isinstance(value, str):
        text = "" if pd.isna(value) else str(value)
        key = str(order.index(text)) if text in order else text
        return {"text": text, "key": key, "class": column.form if _is_text(column) else "text"}
    if pd.isna(value):
        return {"text": "n/a", "key": "", "class": ""}
    write = FORMS.get(column.form, column.form.format)
    text = "∞" if np.isinf(value) else write(float(value)).replace("-", "−")
    return {"text": text, "key": repr(float(value)), "class": ""}


def plain(value: Any) -> str:
    """A setting as a reader writes it.

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
        return ", ".join(map(plain, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(part)}" for key, part in value.items())
    return str(value)


def signed(value: float) -> str:
    """Number with sign and two decimals (three where two would be 0.00), a true minus.

    >>> signed(0.314), signed(-0.0042), signed(0.0)
    ('+0.31', '−0.004', '+0.00')
    """
    digits = 3 if 0 < abs(value) < 0.005 else 2
    return f"{value:+.{digits}f}".replace("-", "−")


def p_text(p_value: float | None) -> str:
    """P-value as it is written after the letter p.

    >>> p_text(0.0002), p_text(0.034)
    ('< 0.001', '= 0.034')
    """
    if p_value is None or np.isnan(p_value):
        return "n/a"
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"


FILTERS: dict[str, Callable[..., Any]] = {
    "by_reason": by_reason, "some": some,
    "fixed": lambda value, digits=2: f"{value:,.{digits}f}", "p": p_text, "plain": plain, "signed": signed,
}  # fmt: skip
FORMS: dict[str, Callable[[float], str]] = {
    "p": lambda value: p_text(value).removeprefix("= "),
    "percent": lambda share: f"{100 * share:.2f}",
    "signed": signed,
    "volume": lambda value: f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}",
}
