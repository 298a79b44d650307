"""Errors that a user can act on, and the exit codes they lead to. Each message names the file and says what to do."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the BIDS Apps execution specification (0 is success)."""

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


class UserError(Exception):
    """Something the user can fix; the command line prints the message alone and leaves with `exit_code`."""

    exit_code: ExitCode = ExitCode.DATA_ERROR


class UsageError(UserError):
    """The command line asks for something that cannot be."""

    exit_code = ExitCode.USAGE


class InvalidBidsError(UserError):
    """The input does not pass the BIDS validator."""

    exit_code = ExitCode.INVALID_BIDS


class FiltersError(UserError):
    """Labels or filters left nothing to do."""

    exit_code = ExitCode.FILTERS_LEFT_NOTHING


class NoInputError(UserError):
    """No T1w image, or only links whose content is absent."""

    exit_code = ExitCode.NO_INPUT


class OutputError(UserError):
    """The output or work directory cannot be written."""

    exit_code = ExitCode.CANNOT_CREATE


class DiskError(OutputError):
    """Writing began and could not be finished: the disk is full or failing."""

    exit_code = ExitCode.CANNOT_WRITE


class EnsembleError(UserError):
    """The ensemble is unknown, damaged or does not fit the request."""


class ScanError(UserError):
    """One image cannot be used; the other subjects go on."""

    exit_code = ExitCode.SUBJECT_FAILED
