"""The order of a participant's sessions in time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from bids_varaug.errors import UserError
from bids_varaug.inputs.participants import SESSION_COLUMNS, prefixed
from bids_varaug.inputs.scans import natural_key
from bids_varaug.inputs.tables import find_column, read_text_table


def order_sessions(bids_dir: Path, participant: str, sessions: Sequence[str]) -> dict[str, float]:
    """Sessions (``ses-1``) of a participant (``sub-01``) in order, each with its days since the first.

    They are ordered by ``acq_time`` (ISO 8601) of ``sub-01_sessions.tsv``, else of the T1w images in
    ``sub-01_ses-1_scans.tsv``. Unless all have one, they are ordered by label, and days are NaN.
    """
    times: dict[str, pd.Timestamp] = {}
    for session, text in _acquisition_times(bids_dir / participant, sessions):
        time = pd.to_datetime(text, format="ISO8601", utc=True, errors="coerce")
        if not pd.isna(time):
            times[session] = min(time, times.get(session, time))
    by_label = sorted(sessions, key=natural_key)
    if not set(sessions) <= times.keys():
        return dict.fromkeys(by_label, float("nan"))
    ordered = sorted(by_label, key=times.__getitem__)
    return {session: (times[session] - times[ordered[0]]).total_seconds() / 86400 for session in ordered}


def _acquisition_times(folder: Path, sessions: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Session and time as written; those of the scans only where the table of sessions has none."""
    table = _read(folder / f"{folder.name}_sessions.tsv")
    column = find_column(table.columns, SESSION_COLUMNS[0], SESSION_COLUMNS)
    found: dict[str, set[str]] = {}
    if column and "acq_time" in table:
        for label, text in table[[column, "acq_time"]].dropna().to_numpy():
            found.setdefault(prefixed(label, "ses"), set()).add(text)
        yield from ((label, texts.pop()) for label, texts in list(found.items()) if len(texts) == 1)
    for label in set(sessions) - found.keys():
        scans = _read(folder / label / f"{folder.name}_{label}_scans.tsv")
        if {"filename", "acq_time"} <= set(scans):
            images = scans[scans["filename"].str.contains("_T1w.", regex=False, na=False)]
            yield from ((label, text) for text in images["acq_time"].dropna())


def _read(path: Path) -> pd.DataFrame:
    try:
        return read_text_table(path) if path.is_file() else pd.DataFrame()
    except UserError:
        return pd.DataFrame()  # as without a table: the caller says that there are no dates
