"""Exit codes of the BIDS Apps execution specification."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the process says when it ends (0 is success)."""

    DONE = 0
    SUBJECT_FAILED = 1
    INVALID_BIDS = 16
    UNKNOWN_LEVEL = 17
    FILTERS_LEFT_NOTHING = 18
    USAGE = 64
    DATA_ERROR = 65
    NO_INPUT = 66
    CANNOT_CREATE = 73
    CANNOT_WRITE = 74
