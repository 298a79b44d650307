"""Rows of class probabilities without their zeros: a quarter of the memory."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bids_varaug.machine import compiled

# The step between probabilities near 1 in float32; of what is no larger nothing is kept.
SMALLEST = np.float32(2**-23)


class PackedRows(NamedTuple):
    """The entries of N rows that are kept.

    counts : (N,) uint16, entries of each row
    classes : (E,) uint8, of each entry, ascending within a row
    values : (E,) float32
    """

    counts: np.ndarray
    classes: np.ndarray
    values: np.ndarray


def pack_rows(rows: np.ndarray) -> PackedRows:
    """Keep the entries of (N, K) float32 rows whose magnitude exceeds `SMALLEST`.

    Examples
    --------
    >>> pack_rows(np.array([[0.25, 0, 0.75], [0, 1, 1e-9]], np.float32)).classes.tolist()
    [0, 2, 1]
    """
    counts = np.empty(len(rows), np.uint16)
    n_kept = _count(rows, counts)
    packed = PackedRows(counts, np.empty(n_kept, np.uint8), np.empty(n_kept, np.float32))
    _pack(rows, packed.classes, packed.values)
    return packed


def unpack_rows(packed: PackedRows, n_classes: int) -> np.ndarray:
    """Return the rows, (N, n_classes) float32, with zeros for what was not kept."""
    rows = np.zeros((len(packed.counts), n_classes), np.float32)
    _unpack(rows, *packed)
    return rows


@compiled()
def _count(rows, counts):
    total = 0
    for n in range(len(rows)):
        kept = 0
        for k in range(rows.shape[1]):
            kept += abs(rows[n, k]) > SMALLEST
        counts[n] = kept
        total += kept
    return total


@compiled()
def _pack(rows, classes, values):
    e = 0
    for n in range(len(rows)):
        for k in range(rows.shape[1]):
            if abs(rows[n, k]) > SMALLEST:
                classes[e] = k
                values[e] = rows[n, k]
                e += 1


@compiled()
def _unpack(rows, counts, classes, values):
    e = 0
    for n in range(len(rows)):
        for _ in range(counts[n]):
            rows[n, classes[e]] = values[e]
            e += 1
