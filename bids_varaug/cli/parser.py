"""Command line of ``bids_varaug``.

Nothing heavy (torch, nipype, pybids, nibabel) is imported here, so that ``--help`` is instant.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import NoReturn

from bids_varaug import __version__
from bids_varaug.cli import values
from bids_varaug.errors import ExitCode, UsageError
from bids_varaug.machine import MAX_DEFAULT_THREADS, available_processors
from bids_varaug.settings import Settings

LEVELS = ("participant", "group")
BRAINAGE_MODELS = ("auto", "ridge", "bayesian_ridge", "svr", "gpr")
AUGMENTATIONS = ("all", "none", "mean", "members", "analytic", "jitter", "shuffled")
RELATIVE_TO = ("none", "brain", "intracranial")
GRIDS = {"auto": 0, "1": 1, "2": 2, "4": 4, "8": 8}  # as `Settings.grids`
NOT_IN_CONFIG = ("--help", "--version", "--config-file")


class Parser(argparse.ArgumentParser):
    """Parser whose errors are `UsageError` (exit code 64 instead of argparse's 2)."""

    def error(self, message: str) -> NoReturn:
        """Raise `UsageError`."""
        raise UsageError(f"{message}\nSee {self.prog} --help.")


# fmt: off
def build_parser() -> argparse.ArgumentParser:
    """Parser of all flags.

    Each `dest` is a field of `Settings`, which gives its default unless one stands here.
    """
    parser = Parser(
        prog="bids_varaug",
        description="Segment T1w images with a numerical ensemble and map where its members disagree (participant); "
        "predict age from the volumes (group).",
        epilog="Flags may be spelled with underscores too (--participant_label).",
        allow_abbrev=False,
    )
    parser.set_defaults(**{f.name: f.default for f in fields(Settings) if f.default != MISSING})
    add = parser.add_argument
    add("bids_dir", type=values.absolute_path, help="input BIDS dataset")
    add("output_dir", type=values.absolute_path,
        help="output directory; inside BIDS_DIR only below BIDS_DIR/derivatives/")
    add("level", metavar="{participant,group}",
        help="level of the analysis: segment images, or predict age from the volumes")
    add = parser.add_argument_group("images").add_argument
    add("--participant-label", dest="participant_labels", type=values.participant_label, nargs="+", metavar="LABEL",
        help="participants to process, with or without sub- (default: all)")
    add("--exclude-participant-label", dest="exclude_participant_labels", type=values.participant_label, nargs="+",
        metavar="LABEL", help="participants to leave out")
    add("--session-label", "--session-id", dest="session_labels", type=values.session_label, nargs="+",
        metavar="LABEL", help="sessions to process, with or without ses- (default: all)")
    add("--bids-filter-file", dest="bids_filters", type=values.existing_file, metavar="JSON",
        help='pybids filters as in fMRIPrep: {"t1w": {"acquisition": null}}')
    add("--bids-database-dir", type=values.absolute_path, metavar="DIR",
        help="pybids database; created for these participants if it does not exist")
    add("--skip-bids-validation", action="store_true", help="do not run the BIDS validator")
    add("--trust", choices=("sform", "qform"),
        help="orientation to use where sform and qform contradict each other (default: the scanner's, with a warning)")
    add_ensemble(parser)
    _add_running(parser)
    _add_group_level(parser)
    return parser


def add_ensemble(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the ensemble and its members."""
    add = parser.add_argument_group("ensemble").add_argument
    add("--ensemble", type=values.ensemble, metavar="NAME|DIR", default=Settings.ensemble,
        help="a shipped ensemble, or the folder of one (default: %(default)s)")
    add("--members", type=values.member_names, nargs="+", metavar="NAME", default=Settings.members,
        help="families (mca, seed, ieee), single members such as mca01, or all (default: all)")
    add("--n-members", type=values.positive_int, metavar="N", help="use the first N members of each family")
    add("--perturb-inference", type=values.rounded_members, metavar="N", default=Settings.perturb_inference,
        help="also run the baseline N times (0 to 99) with random rounding, as members rr01, rr02, ... (default: "
        "%(default)s)")
    add("--grids", choices=tuple(GRIDS), default="auto",
        help="number of grids, shifted by one voxel, on which the baseline segments the image. Its posteriors are "
        "averaged and those of the other members corrected likewise: volumes then depend less on the position of the "
        "head. auto: 4 if the members share a trunk; 1 otherwise and with --sloppy (default: %(default)s)")
    add("--write-members", action="store_true", help="also write the labels of each member")
    add("--family-maps", action="store_true", help="also write the maps of spread of each family")
    add("--random-seed", type=values.seed, metavar="N", default=Settings.random_seed,
        help="seed of --perturb-inference, the only random numbers of the participant level; group level: seed of "
        "folds, noise and resampling (default: %(default)s)")
    add("--sloppy", action="store_true", help="2 mm and two members: for tests and demos only")


def _add_running(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("computing").add_argument
    add("--device", type=values.device, metavar="auto|cpu|cuda[:N]", default="auto",
        help="where the networks run; auto uses a GPU if there is one (default: %(default)s)")
    add("--nprocs", type=values.positive_int, metavar="N", default=None,
        help="number of processors (default: all available)")
    add("--omp-nthreads", type=values.positive_int, metavar="N", default=None,
        help=f"threads per task (default: --nprocs, at most {MAX_DEFAULT_THREADS})")
    add("--mem", dest="mem_gb", type=values.memory_gb, metavar="8G",
        help="memory limit: 8G, 8000M, 8 (= 8G) (default: 90 %% of what is available)")
    add("--use-plugin", "--nipype-plugin-file", dest="plugin", type=values.existing_file, metavar="YML",
        help="nipype plugin settings (default: MultiProc)")
    add = parser.add_argument_group("running").add_argument
    add("-w", "--work-dir", type=values.absolute_path, metavar="DIR",
        help="intermediate results; to resume, pass the same folder (default: ./work)")
    add("--clean-workdir", action="store_true",
        help="remove intermediate results: an image's once it is written, the rest at the end")
    add("--dry-run", action="store_true", help="show what would be done and stop")
    add("--reports-only", action="store_true", help="rewrite the reports from existing outputs")
    add("--stop-on-first-crash", action="store_true", help="stop everything when one image fails")
    add("--notrack", action="store_true", help="accepted for compatibility, without effect: there is no telemetry")
    add("--config-file", type=values.existing_file, metavar="TOML",
        help="default values of flags, one 'flag = value' per line; the command line wins")
    add("-v", "--verbose", dest="verbosity", action="count", help="show nipype's messages (-vv: all of them)")
    add("--version", action="version", version=f"bids_varaug {__version__}", help="show the version and exit")


def _add_group_level(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("group level").add_argument
    for name in ("age", "site", "sex"):
        add(f"--{name}-column", metavar="NAME", help="column of participants.tsv (default: %(default)s)")
    add("--brainage-model", choices=BRAINAGE_MODELS,
        help="regression model; auto selects one within the training folds (default: %(default)s)")
    add("--augmentation", choices=AUGMENTATIONS,
        help="how the members augment the training data, compared with none; all compares each way with the controls "
        "jitter and shuffled too (default: %(default)s)")
    add("--cv-folds", type=values.folds, metavar="N",
        help="folds of the cross-validation, grouped by participant (default: %(default)s)")
    add("--features-table", type=values.existing_file, metavar="TSV",
        help="features from another tool, one row per participant and member")
    add("--relative-to", choices=RELATIVE_TO,
        help="what to divide volumes by (default: brain, the sum of the structures; none with --features-table)")
    add("--asymmetries", action="store_true", help="add left-right asymmetries to the features")
    add("--log-volumes", action="store_true", help="use logarithms of volumes")
    add("--apply-model", type=values.existing_file, metavar="FILE",
        help="predict ages with a saved model (models/brainage.skops); fit nothing")
    add("--compare", type=values.named_path, nargs="+", metavar="NAME=DIR",
        help="repeated runs of another pipeline to compare with: FreeSurfer stats folders, a members table, or a table "
        "of minimum Dice (.csv)")
# fmt: on


def parse_settings(argv: Sequence[str] | None = None) -> Settings:
    """The request that a command line makes; `argv` is without the program's name.

    Raises
    ------
    UsageError
        Exit code 64, or 17 for a level that does not exist.
    NoInputError, OutputError
        As `values.check_paths`.
    """
    argv = [dash_flag(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    parser = build_parser()
    given = parser.parse_args(argv)
    if given.config_file is not None:  # the command line wins
        given = parser.parse_args(argv, read_config(parser, given.config_file))
    if given.level not in LEVELS:
        error = UsageError(f"{given.level!r} is not a level of analysis: use {' or '.join(LEVELS)}.")
        error.exit_code = ExitCode.UNKNOWN_LEVEL
        raise error
    given.work_dir = given.work_dir or Path.cwd() / "work"
    values.check_paths(given.bids_dir, given.output_dir, given.work_dir)
    given.nprocs = given.nprocs or available_processors()
    given.omp_nthreads = given.omp_nthreads or min(given.nprocs, MAX_DEFAULT_THREADS)
    if given.omp_nthreads > given.nprocs:
        raise UsageError(
            f"--omp-nthreads {given.omp_nthreads} is more than --nprocs {given.nprocs}: no task could start."
        )
    given.bids_filters = values.read_bids_filters(given.bids_filters) if given.bids_filters else {}
    given.plugin = values.read_plugin(given.plugin) if given.plugin else None
    given.members = values.split_members(given.members)
    given.grids = GRIDS[given.grids]
    for name in ("participant_labels", "exclude_participant_labels", "session_labels"):
        labels = (label.rpartition("-")[2] for label in getattr(given, name))  # without sub- or ses-
        setattr(given, name, tuple(dict.fromkeys(labels)))
    given.compare = tuple(dict.fromkeys(given.compare))
    return Settings(**{field.name: getattr(given, field.name) for field in fields(Settings)})


def dash_flag(argument: str) -> str:
    """Spell a flag with dashes; values stay as they are.

    Examples
    --------
    >>> dash_flag("--work_dir=my_dir"), dash_flag("my_dir")
    ('--work-dir=my_dir', 'my_dir')
    """
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if re.match(r"--\w", name) else argument


def read_config(parser: argparse.ArgumentParser, path: Path) -> argparse.Namespace:
    """What the flags in a TOML file say: their names without ``--``, with dashes or underscores.

    Raises
    ------
    UsageError
        If it is not TOML, or holds an unknown flag or a value that the flag does not take.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    actions = parser._option_string_actions
    arguments = ["in", "out", "level"]  # those of the command line replace them
    for name, value in values.read_file("--config-file", path, "TOML", tomllib.loads).items():
        flag = dash_flag(f"--{name}")
        if flag not in actions or flag in NOT_IN_CONFIG:
            raise UsageError(f"--config-file {path}: unknown flag {name!r}.")
        # A value of the wrong kind becomes an argument that the parser refuses.
        if actions[flag].nargs == 0 and isinstance(value, int) and value in range(10):  # or true, false
            arguments += [flag] * value
        elif actions[flag].nargs == "+" and isinstance(value, list):
            arguments += [flag, *map(str, value)]
        else:
            arguments.append(f"{flag}={value}")
    try:
        return parser.parse_args(arguments)
    except UsageError as error:
        raise UsageError(f"--config-file {path}: {error}") from error
