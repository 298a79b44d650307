"""What a page of the group level shows, as a file: the page can be made again without fitting."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bids_varaug.brainage.study import Study
from bids_varaug.derivatives.write import write_text
from bids_varaug.errors import NoInputError, UserError
from bids_varaug.reports.citation import Citation, Reference
from bids_varaug.reports.group import ComparedPipeline, GroupContent
from bids_varaug.reports.group_applied import AppliedContent

FORMAT = 1
KINDS = {"scored": GroupContent, "applied": AppliedContent}
ADVICE = "Run the group level again without --reports-only."


def save_content(path: Path, content: GroupContent | AppliedContent) -> Path:
    """Write the content of a page as JSON; what `load_content` reads gives the same page.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    kind = next(name for name, type_ in KINDS.items() if isinstance(content, type_))
    saved = {"format": FORMAT, "kind": kind, "content": _encode(content)}
    return write_text(json.dumps(saved, ensure_ascii=False, allow_nan=False) + "\n", path)


def load_content(path: Path) -> GroupContent | AppliedContent:
    """Read what `save_content` wrote.

    Raises
    ------
    NoInputError
        If it is not there.
    UserError
        If it is damaged, or of another format.
    """
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        if saved["format"] != FORMAT:
            raise UserError(f"{path}: of format {saved['format']}, not {FORMAT}. {ADVICE}")
        type_, parts = KINDS[saved["kind"]], _decode(saved["content"])
        parts["citation"] = _citation(parts["citation"])
        if type_ is GroupContent:
            parts["study"] = Study(**parts["study"])
            parts["compared"] = [ComparedPipeline(**other) for other in parts["compared"]]
        return type_(**parts)
    except FileNotFoundError as error:
        raise NoInputError(
            f"{path}: is not there. The group level leaves it, and --reports-only makes the page "
            f"from it. {ADVICE}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}). {ADVICE}") from error


def _citation(parts: Mapping[str, Any]) -> Citation:
    return Citation(parts["methods"], tuple(Reference(**work) for work in parts["references"]))


def _encode(value: Any) -> Any:
    if isinstance(value, pd.DataFrame):
        return {"table": {str(name): _encode_column(value[name]) for name in value.columns}}
    if is_dataclass(value):
        return {f.name: _encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _encode(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(part) for part in value]
    if isinstance(value, np.generic):
        return _encode(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return {"number": repr(value)}
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _encode_column(column: pd.Series) -> dict[str, Any]:
    kind = {"i": "int64", "u": "int64", "b": "bool", "f": "float64"}.get(column.dtype.kind)
    if kind == "float64":  # JSON has neither of "nan" and "inf", float() reads both
        values = [v if np.isfinite(v) else repr(v) for v in column.tolist()]
    elif kind:
        values = column.tolist()
    else:
        values = [None if pd.isna(v) else _encode(v) for v in column]
    return {"type": kind or "object", "values": values}


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(part) for part in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"table"}:
        columns = value["table"].items()
        return pd.DataFrame({name: np.array(c["values"], dtype=c["type"]) for name, c in columns})
    if value.keys() == {"number"}:
        return float(value["number"])
    return {key: _decode(part) for key, part in value.items()}
