"""Command line of ``bids_varaug``.

Nothing heavy (torch, nipype, pybids, nibabel) is imported here, so that ``--help`` is instant.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from bids_varaug.cli import values
from bids_varaug.cli.paths import check_paths
from bids_varaug.errors import ExitCode, UsageError
from bids_varaug.machine import available_processors
from bids_varaug.settings import Settings

LEVELS = ("participant", "group")
BRAINAGE_MODELS = ("auto", "ridge", "bayesian_ridge", "svr", "gpr")
AUGMENTATIONS = ("all", "none", "mean", "members", "analytic", "jitter", "shuffled")
RELATIVE_TO = ("none", "brain", "intracranial")
MAX_DEFAULT_THREADS = 8  # a 3D convolution gains little from more


class UnknownLevelError(UsageError):
    """The analysis level is neither participant nor group."""

    exit_code = ExitCode.UNKNOWN_LEVEL


class _Parser(argparse.ArgumentParser):
    """Parser whose errors are `UsageError` (exit code 64 instead of argparse's 2)."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\nSee {self.prog} --help.")


class _Version(argparse.Action):
    """Print the version, which is looked up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from bids_varaug.derivatives.sidecars import package_version

        print(f"bids_varaug {package_version()}")
        parser.exit(0)


def build_parser(positionals: bool = True) -> argparse.ArgumentParser:
    """Parser of all flags; without the positional arguments it reads configuration files."""
    parser = _Parser(
        prog="bids_varaug",
        description="Segment T1w images with a numerical ensemble, map its disagreement "
        "(participant), and predict age with it (group).",
        epilog="Flags may be spelled with underscores too (--participant_label).",
        allow_abbrev=False,
    )
    if positionals:
        parser.add_argument("bids_dir", type=values.absolute_path, help="input BIDS dataset")
        parser.add_argument(
            "output_dir",
            type=values.absolute_path,
            help="derivatives; not inside BIDS_DIR except below BIDS_DIR/derivatives/",
        )
        parser.add_argument(
            "level",
            metavar="{participant,group}",
            help="level of the analysis: segment images, or predict age from what that left",
        )
    _add_selection(parser)
    _add_ensemble(parser)
    _add_resources(parser)
    _add_running(parser)
    _add_group_level(parser)
    return parser


def _add_selection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which images")
    label = {"nargs": "+", "metavar": "LABEL", "default": []}
    group.add_argument(
        "--participant-label",
        type=values.participant_label,
        help="participants to process, with or without sub- (default: all)",
        **label,
    )
    group.add_argument(
        "--exclude-participant-label",
        type=values.participant_label,
        help="participants to leave out",
        **label,
    )
    group.add_argument(
        "--session-label",
        "--session-id",
        type=values.session_label,
        help="sessions to process, with or without ses- (default: all)",
        **label,
    )
    group.add_argument(
        "--bids-filter-file",
        type=values.existing_file,
        metavar="JSON",
        help='pybids filters in the nipreps form: {"t1w": {"acquisition": null}}',
    )
    group.add_argument(
        "--bids-database-dir",
        type=values.absolute_path,
        metavar="DIR",
        help="pybids database: read where there is one, else made for these participants",
    )
    group.add_argument(
        "--skip-bids-validation", action="store_true", help="do not check that BIDS_DIR is valid"
    )
    group.add_argument(
        "--trust",
        choices=("sform", "qform"),
        help="which form of the header to use where the two contradict each other (default: that "
        "of the scanner, with a warning)",
    )


def _add_ensemble(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the ensemble")
    group.add_argument(
        "--ensemble",
        type=values.ensemble,
        metavar="NAME|DIR",
        default="aseg31",
        help="shipped ensemble, or the folder of one (default: %(default)s)",
    )
    group.add_argument(
        "--members",
        type=values.member_names,
        nargs="+",
        metavar="NAME",
        default=[("all",)],
        help="families (mca, seed, ieee), single members such as mca01, or all (default: all)",
    )
    group.add_argument(
        "--n-members", type=values.positive_int, metavar="N", help="the first N of each family"
    )
    group.add_argument(
        "--perturb-inference",
        type=values.rounded_members,
        metavar="N",
        default=0,
        help="run the baseline N times (0 to 99) under random rounding too, as members rr01, "
        "rr02, ... (default: %(default)s)",
    )
    group.add_argument(
        "--grids",
        choices=("auto", "1", "2", "4", "8"),
        default="auto",
        help="on how many grids, a voxel apart, the baseline segments the image; its posteriors "
        "are averaged, and those of the other members moved by what that changes, so that volumes "
        "depend less on where the head lies. auto: 4 where the members share a trunk, else and "
        "with --sloppy 1 (default: %(default)s)",
    )
    group.add_argument(
        "--write-members", action="store_true", help="write the labels of each member too"
    )
    group.add_argument(
        "--random-seed",
        type=values.seed,
        metavar="N",
        default=0,
        help="seed of the random rounding of --perturb-inference, all that the participant level "
        "draws; group level: of folds, noise and resampling (default: %(default)s)",
    )
    group.add_argument(
        "--sloppy", action="store_true", help="2 mm and two members: for tests and demos only"
    )


def _add_resources(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("computing")
    group.add_argument(
        "--device",
        type=values.device,
        metavar="auto|cpu|cuda[:N]",
        default="auto",
        help="auto (default) takes a GPU where there is one",
    )
    group.add_argument(
        "--nprocs", type=values.positive_int, metavar="N", help="processors (default: available)"
    )
    group.add_argument(
        "--omp-nthreads",
        type=values.positive_int,
        metavar="N",
        help=f"threads of one task (default: --nprocs, at most {MAX_DEFAULT_THREADS})",
    )
    group.add_argument(
        "--mem", type=values.memory_gb, metavar="8G", help="memory limit: 8G, 8000M, 8 (= 8G)"
    )
    group.add_argument(
        "--use-plugin",
        "--nipype-plugin-file",
        type=values.existing_file,
        metavar="YML",
        help="nipype plugin settings",
    )


def _add_running(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    group.add_argument(
        "-w",
        "--work-dir",
        type=values.absolute_path,
        metavar="DIR",
        default=None,
        help="intermediate results; give the same again to resume (default: ./work)",
    )
    for flag, text in (
        ("--clean-workdir", "remove the work of an image once it is written, the rest at the end"),
        ("--dry-run", "show what would be done and stop"),
        ("--reports-only", "write the reports anew from existing outputs"),
        ("--stop-on-first-crash", "stop everything when one image fails"),
        ("--notrack", "accepted and without effect: there is no telemetry"),
    ):
        group.add_argument(flag, action="store_true", help=text)
    group.add_argument(
        "--config-file",
        type=values.existing_file,
        metavar="TOML",
        help="defaults of any flag, one 'flag = value' a line; the command line wins",
    )
    group.add_argument(
        "-v", "--verbose", action="count", default=0, help="nipype's messages (-vv: all of them)"
    )
    group.add_argument("--version", action=_Version, help="show the version and exit")


def _add_group_level(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("group level")
    for name in ("age", "site", "sex"):
        group.add_argument(
            f"--{name}-column",
            metavar="NAME",
            default=name,
            help="column of participants.tsv (default: %(default)s)",
        )
    group.add_argument(
        "--brainage-model",
        choices=BRAINAGE_MODELS,
        default="auto",
        help="regression; auto chooses within the training folds (default: %(default)s)",
    )
    group.add_argument(
        "--augmentation",
        choices=AUGMENTATIONS,
        default="all",
        help="how the members serve, beside none; all compares each with the controls jitter and "
        "shuffled (default: %(default)s)",
    )
    group.add_argument(
        "--cv-folds",
        type=values.folds,
        metavar="N",
        default=5,
        help="folds of the cross-validation, grouped by participant (default: %(default)s)",
    )
    group.add_argument(
        "--features-table",
        type=values.existing_file,
        metavar="TSV",
        help="features made elsewhere, one row per participant and member",
    )
    group.add_argument(
        "--relative-to",
        choices=RELATIVE_TO,
        help="what volumes are divided by (default: brain, the sum of the structures; none for "
        "--features-table)",
    )
    group.add_argument(
        "--asymmetries", action="store_true", help="left-right asymmetries as further features"
    )
    group.add_argument(
        "--log-volumes", action="store_true", help="logarithms of volumes in place of volumes"
    )
    group.add_argument(
        "--apply-model",
        type=values.existing_file,
        metavar="FILE",
        help="predict ages with a model fitted before (models/brainage.skops); fit nothing",
    )
    group.add_argument(
        "--compare",
        type=values.named_path,
        nargs="+",
        metavar="NAME=DIR",
        default=[],
        help="another pipeline's repeated runs: FreeSurfer stats folders, a members table, or a "
        "table of minimum Dice (.csv)",
    )


def parse_settings(argv: Sequence[str] | None = None) -> Settings:
    """The request that a command line makes.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; default ``sys.argv[1:]``.

    Raises
    ------
    UsageError
        Exit code 64, or 17 (`UnknownLevelError`) for a level that does not exist.
    NoInputError, OutputError
        As `check_paths`.
    SystemExit
        After ``--help`` and ``--version``.
    """
    argv = [dash_flag(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    parser = build_parser()
    config_parser = _Parser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config-file", type=values.existing_file)
    config_file = config_parser.parse_known_args(argv)[0].config_file
    if config_file is not None:
        parser.set_defaults(**read_config(config_file))
    given = parser.parse_args(argv)
    if given.level not in LEVELS:
        raise UnknownLevelError(
            f"{given.level!r} is not a level of analysis: give {' or '.join(LEVELS)}."
        )
    work_dir = given.work_dir or Path.cwd() / "work"
    check_paths(given.bids_dir, given.output_dir, work_dir)
    nprocs = given.nprocs or available_processors()
    omp_nthreads = given.omp_nthreads or min(nprocs, MAX_DEFAULT_THREADS)
    if omp_nthreads > nprocs:
        raise UsageError(
            f"--omp-nthreads {omp_nthreads} is more than --nprocs {nprocs}: no task could start."
        )
    return Settings(
        bids_dir=given.bids_dir,
        output_dir=given.output_dir,
        level=given.level,
        work_dir=work_dir,
        participant_labels=_unique(given.participant_label),
        exclude_participant_labels=_unique(given.exclude_participant_label),
        session_labels=_unique(given.session_label),
        bids_filters=(
            values.read_bids_filters(given.bids_filter_file) if given.bids_filter_file else {}
        ),
        bids_database_dir=given.bids_database_dir,
        skip_bids_validation=given.skip_bids_validation,
        trust=given.trust,
        ensemble=given.ensemble,
        members=_unique(name for names in given.members for name in names),
        n_members=given.n_members,
        perturb_inference=given.perturb_inference,
        grids=0 if given.grids == "auto" else int(given.grids),
        write_members=given.write_members,
        device=given.device,
        nprocs=nprocs,
        omp_nthreads=omp_nthreads,
        mem_gb=given.mem,
        plugin=values.read_plugin(given.use_plugin) if given.use_plugin else None,
        clean_workdir=given.clean_workdir,
        random_seed=given.random_seed,
        sloppy=given.sloppy,
        dry_run=given.dry_run,
        reports_only=given.reports_only,
        stop_on_first_crash=given.stop_on_first_crash,
        verbosity=given.verbose,
        age_column=given.age_column,
        site_column=given.site_column,
        sex_column=given.sex_column,
        brainage_model=given.brainage_model,
        augmentation=given.augmentation,
        cv_folds=given.cv_folds,
        features_table=given.features_table,
        relative_to=given.relative_to,
        asymmetries=given.asymmetries,
        log_volumes=given.log_volumes,
        apply_model=given.apply_model,
        compare=_unique(given.compare),
    )


def dash_flag(argument: str) -> str:
    """Spell a flag with dashes; values stay as they are.

    Examples
    --------
    >>> dash_flag("--work_dir=my_dir"), dash_flag("my_dir")
    ('--work-dir=my_dir', 'my_dir')
    """
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if re.match(r"--\w", name) else argument


def read_config(path: Path) -> dict[str, Any]:
    """Defaults of flags from a TOML file: names of flags without ``--``, dashes or underscores.

    Raises
    ------
    UsageError
        If it is not TOML, or holds an unknown flag or a value that the flag does not take.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--config-file {path}: cannot read it as TOML: {error}.") from error
    parser = build_parser(positionals=False)
    actions = parser._option_string_actions
    arguments: list[str] = []
    dests = []
    for name, value in table.items():
        flag = dash_flag(f"--{name}")
        if flag not in actions or flag in ("--help", "--version", "--config-file"):
            raise UsageError(f"--config-file {path}: unknown flag {name!r}.")
        dests.append(actions[flag].dest)
        arguments += _config_arguments(path, name, flag, actions[flag], value)
    try:
        given = vars(parser.parse_args(arguments))
    except UsageError as error:
        raise UsageError(f"--config-file {path}: {error}") from error
    return {dest: given[dest] for dest in dests}


def _config_arguments(
    path: Path, name: str, flag: str, action: argparse.Action, value: Any
) -> list[str]:
    """Command line arguments that say what a line of a configuration file says."""
    is_switch = isinstance(action, argparse._StoreTrueAction)
    is_count = isinstance(action, argparse._CountAction)
    if is_switch and isinstance(value, bool):
        return [flag] if value else []
    if is_count and isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10:
        return [flag] * value
    items = value if isinstance(value, list) and action.nargs == "+" else [value]
    simple = all(isinstance(i, (str, int, float)) and not isinstance(i, bool) for i in items)
    if is_switch or is_count or not simple or not items:
        raise UsageError(f"--config-file {path}: {name} = {value!r} is not a value of {flag}.")
    if action.nargs == "+":
        return [flag, *map(str, items)]
    return [f"{flag}={items[0]}"]


def _unique(names: Any) -> tuple[str, ...]:
    """Names in the order given, each once."""
    return tuple(dict.fromkeys(names))
