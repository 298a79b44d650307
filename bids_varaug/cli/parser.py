"""Command line of ``bids_varaug``: flags, their values, settings files, and the directories of a run.

Nothing heavy (torch, nipype, pybids, nibabel) is imported here, so that ``--help`` is instant.
"""

# ruff: noqa: PTH100, PTH110, PTH111, PTH112, PTH113
# os.path where it gives False, and pathlib an error, because a parent folder may not be looked into.

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

from bids_varaug import __version__
from bids_varaug.errors import ExitCode, NoInputError, OutputError, UsageError
from bids_varaug.machine import MAX_DEFAULT_THREADS, available_processors
from bids_varaug.settings import Settings

LEVELS = ("participant", "group")
BRAINAGE_MODELS = ("auto", "ridge", "bayesian_ridge", "svr", "gpr")
AUGMENTATIONS = ("all", "none", "mean", "members", "analytic", "jitter", "shuffled")
RELATIVE_TO = ("none", "brain", "intracranial")
OF_VOLUMES = (
    "features_table", "relative_to", "asymmetries", "log_volumes", "compare", "output_spaces", "no_brain_age",
)  # fmt: skip  # flags of the group level that are for volumes
GIB_PER_UNIT = {"K": 2.0**-20, "M": 2.0**-10, "G": 1.0, "T": 2.0**10}
SPACE = "MNI152NLin2009cAsym"
NOT_IN_CONFIG = ("--help", "--version", "--config-file")
BOTH_LEVELS = (
    "age_column", "sex_column", "participant_labels", "exclude_participant_labels", "session_labels", "random_seed",
    "skip_bids_validation",
)  # fmt: skip  # of flags in the groups of one level


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
        "check the volumes of a group, and predict age from them (group).",
        epilog="Flags may be spelled with underscores too (--participant_label).",
        allow_abbrev=False,
    )
    parser.set_defaults(**{f.name: f.default for f in fields(Settings) if f.default != MISSING})
    add = parser.add_argument
    add("bids_dir", type=absolute_path, help="input BIDS dataset")
    add("output_dir", type=absolute_path, help="output directory; inside BIDS_DIR only below BIDS_DIR/derivatives/")
    add("level", metavar="{participant,group}",
        help="level of the analysis: segment images; or check their volumes, and predict age from them")
    add = parser.add_argument_group("images").add_argument
    add("--participant-label", dest="participant_labels", type=participant_label, nargs="+", metavar="LABEL",
        help="participants to process, with or without sub- (default: all)")
    add("--exclude-participant-label", dest="exclude_participant_labels", type=participant_label, nargs="+",
        metavar="LABEL", help="participants to leave out")
    add("--session-label", "--session-id", dest="session_labels", type=session_label, nargs="+",
        metavar="LABEL", help="sessions to process, with or without ses- (default: all)")
    add("--bids-filter-file", dest="bids_filters", type=existing_file, metavar="JSON",
        help='pybids filters as in fMRIPrep: {"t1w": {"acquisition": null}}')
    add("--bids-database-dir", type=absolute_path, metavar="DIR",
        help="pybids database; created for these participants if it does not exist")
    add("--skip-bids-validation", action="store_true", help="do not run the BIDS validator")
    add("--trust", choices=("sform", "qform"),
        help="orientation to use where sform and qform contradict each other (default: the scanner's, with a warning)")
    add("--freesurfer-dir", type=absolute_path, metavar="DIR",
        help="also write DIR/sub-01/mri/aseg.varaug.mgz, stats/aseg.stats (aseg+DKT.stats with FastSurfer's networks) "
        "and a colour table, for programs that read a FreeSurfer subjects directory")
    _add_ensemble(parser)
    _add_template(parser)
    _add_running(parser)
    _add_group_level(parser)
    return parser


def build_segment_parser() -> argparse.ArgumentParser:
    """Parser of ``bids_varaug-segment``; flags that are no path are the arguments of `bids_varaug.segment`."""
    parser = Parser(
        prog="bids_varaug-segment",
        description="Segment one T1w image with a numerical ensemble and map where its members disagree. For a BIDS "
        "dataset, use bids_varaug.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("image", type=absolute_path, help="T1w image, .nii or .nii.gz")
    add("output_dir", type=absolute_path, help="a new or an empty folder")
    add("--report", action="store_true", help="also write the HTML report")
    _add_ensemble(parser)
    add = parser.add_argument_group("computing").add_argument
    add("--trust", choices=("sform", "qform"), help="orientation to use where sform and qform contradict each other")
    add("--device", type=device_name, metavar="auto|cpu|cuda[:N]", default="auto",
        help="where the networks run (default: %(default)s)")
    add("--omp-nthreads", dest="n_threads", type=whole_number(1), metavar="N",
        help=f"threads (default: all, at most {MAX_DEFAULT_THREADS})")
    add("--version", action="version", version=f"bids_varaug {__version__}", help="show the version and exit")
    return parser


def build_power_parser() -> argparse.ArgumentParser:
    """Parser of ``bids_varaug-power``."""
    text = "Could numerical noise change a published result? For two groups of equal size, or a correlation."
    parser = Parser(prog="bids_varaug-power", description=text)
    add = parser.add_argument
    add("--npvr", type=float, required=True, help="numerical-to-population variability ratio: models/power.tsv, npv")
    add("--n", type=int, required=True, help="people in the study")
    add("--p", type=float, required=True, help="published p-value, two-sided")
    add("--version", action="version", version=f"bids_varaug {__version__}", help="show the version and exit")
    return parser


def _add_ensemble(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("ensemble").add_argument
    add("--ensemble", type=ensemble_name, metavar="NAME|DIR", default=Settings.ensemble,
        help="a shipped ensemble, or the folder of one (default: %(default)s)")
    add("--members", type=member_names, nargs="+", metavar="NAME", default=Settings.members,
        help="families (mca, seed, ieee), single members such as mca01, or all (default: all)")
    add("--n-members", type=whole_number(1), metavar="N", help="use the first N members of each family")
    add("--perturb-inference", type=whole_number(0, 99), metavar="N", default=Settings.perturb_inference,
        help="also run the baseline N times (0 to 99) with random rounding, as members rr01, rr02, ... (default: "
        "%(default)s)")
    add("--write-members", action="store_true", help="also write the labels of each member")
    add("--family-maps", action="store_true", help="also write the maps of spread of each family")
    add("--random-seed", type=whole_number(0), metavar="N", default=Settings.random_seed,
        help="seed of --perturb-inference, the only random numbers of the participant level; group level: seed of "
        "folds, noise and resampling (default: %(default)s)")
    add("--sloppy", action="store_true",
        help="2 mm grid, and one member of each family unless --members or --n-members say otherwise: for tests and "
        "demos only")
    add("--whole-voxels", action="store_true",
        help="with FastSurfer's networks: conform images with an odd number of voxels without FastSurfer's shift by "
        "half a voxel, and without the blur")


def _add_template(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("template space").add_argument
    add("--output-spaces", type=output_space, nargs="+", metavar="SPACE[:res-N]",
        help=f"also write consensus and maps in a template's space, with the transforms: {SPACE} (1 mm) or "
        f"{SPACE}:res-2; group level: also average the participants' maps there")
    add("--refine", type=whole_number(0, 1000), metavar="N",
        help="iterations that bring each member's segmentation onto the template's after the affine; 0: affine only "
        "(default: %(default)s)")
    add("--allow-downloads", action="store_true",
        help="let TemplateFlow fetch the template's T1w image; without it, nothing is ever downloaded")


def _add_running(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("computing").add_argument
    add("--device", type=device_name, metavar="auto|cpu|cuda[:N]", default="auto",
        help="where the networks run; auto uses a GPU if there is one (default: %(default)s)")
    add("--nprocs", type=whole_number(1), metavar="N", default=None,
        help="number of processors (default: all available)")
    add("--omp-nthreads", type=whole_number(1), metavar="N", default=None,
        help=f"threads per task (default: --nprocs, at most {MAX_DEFAULT_THREADS})")
    add("--mem", dest="mem_gb", type=memory_gb, metavar="8G",
        help="memory limit: 8G, 8000M, 8 (= 8G) (default: 90 %% of what is available)")
    add("--use-plugin", "--nipype-plugin-file", dest="plugin", type=existing_file, metavar="YML",
        help="nipype plugin settings (default: MultiProc)")
    add = parser.add_argument_group("running").add_argument
    add("-w", "--work-dir", type=absolute_path, metavar="DIR",
        help="intermediate results; to resume, pass the same folder (default: ./work)")
    add("--clean-workdir", action="store_true",
        help="remove intermediate results: an image's once it is written, the rest at the end")
    add("--dry-run", action="store_true", help="show what would be done and stop")
    add("--reports-only", action="store_true", help="rewrite the reports from existing outputs")
    add("--stop-on-first-crash", action="store_true", help="stop everything when one image fails")
    add("--notrack", action="store_true", help="accepted for compatibility, without effect: there is no telemetry")
    add("--config-file", type=existing_file, metavar="TOML",
        help="default values of flags, one 'flag = value' per line; the command line wins")
    add("-v", "--verbose", dest="verbosity", action="count", help="show nipype's messages (-vv: all of them)")
    add("--version", action="version", version=f"bids_varaug {__version__}", help="show the version and exit")


def _add_group_level(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("group level").add_argument
    for name in ("age", "site", "sex"):
        add(f"--{name}-column", metavar="NAME", help="column of participants.tsv (default: %(default)s)")
    add("--no-brain-age", action="store_true", help="only check the volumes; needs no ages")
    add("--include", metavar="CONDITION",
        help="participants to include, by the columns of participants.tsv or of the features table: \"group == 'TD'\"")
    add("--target", metavar="COLUMN",
        help="predict this column of participants.tsv or of the features table, a number or a category, not the age")
    add("--covariates", nargs="+", metavar="COLUMN",
        help="with --target, what to predict from beside the features, and alone: age, sex, site, icv or any column")
    add("--brainage-model", choices=BRAINAGE_MODELS,
        help="regression model; auto selects one within the training folds (default: %(default)s)")
    add("--augmentation", choices=AUGMENTATIONS,
        help="how the members augment the training data, compared with none; all compares each way with the controls "
        "jitter and shuffled too (default: %(default)s)")
    add("--cv-folds", type=whole_number(2), metavar="N",
        help="folds of the cross-validation, grouped by participant (default: %(default)s)")
    add("--features", choices=("volumes", "images"),
        help="what to predict from: the volumes of structures, or the images as an encoder sees them (default: "
        "%(default)s)")
    add("--encoder", type=absolute_path, metavar="DIR",
        help="with --features images, the folder of the encoder, written by bids_varaug-pretrain")
    add("--features-table", type=existing_file, metavar="TSV",
        help="features from another tool, one row per participant and member")
    add("--relative-to", choices=RELATIVE_TO,
        help="what to divide volumes by (default: brain, the sum of the structures; none with --features-table)")
    add("--asymmetries", action="store_true", help="add left-right asymmetries to the features")
    add("--log-volumes", action="store_true", help="use logarithms of volumes")
    add("--apply-model", type=existing_file, metavar="FILE",
        help="predict ages with a saved model (models/brainage.skops); fit nothing")
    add("--compare", type=named_path, nargs="+", metavar="NAME=DIR",
        help="repeated runs of another pipeline to compare with: FreeSurfer stats folders, a members table, or a table "
        "of minimum Dice (.csv)")
# fmt: on


def parse_settings(argv: Sequence[str] | None = None) -> Settings:
    """The request that a command line makes; `argv` is without the program's name.

    `UsageError` for what cannot be asked for (exit code 64, or 17 for an unknown level); else raises as `check_paths`.
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
    for flag, where in _without_effect(parser, given):
        print(f"Note: {flag} has no effect {where}.", file=sys.stderr)
    given.work_dir = given.work_dir or Path.cwd() / "work"
    check_paths(given.bids_dir, given.output_dir, given.work_dir, given.freesurfer_dir)
    given.nprocs = given.nprocs or available_processors()
    given.omp_nthreads = given.omp_nthreads or min(given.nprocs, MAX_DEFAULT_THREADS)
    if given.omp_nthreads > given.nprocs:
        raise UsageError(
            f"--omp-nthreads {given.omp_nthreads} is more than --nprocs {given.nprocs}: no task could start."
        )
    given.bids_filters = read_bids_filters(given.bids_filters) if given.bids_filters else {}
    given.plugin = read_plugin(given.plugin) if given.plugin else None
    given.members = split_members(given.members)
    given.output_spaces = tuple(dict.fromkeys(re.sub("-0+", "-", space) for space in given.output_spaces))
    for name in ("participant_labels", "exclude_participant_labels", "session_labels"):
        labels = (label.rpartition("-")[2] for label in getattr(given, name))  # without sub- or ses-
        setattr(given, name, tuple(dict.fromkeys(labels)))
    given.covariates = tuple(dict.fromkeys(given.covariates))
    if given.covariates and given.target is None:
        raise UsageError("--covariates needs --target: age is predicted from the features alone.")
    if given.level == "group":
        _check_features(parser, given)
    given.compare = tuple(dict.fromkeys(given.compare))
    return Settings(**{field.name: getattr(given, field.name) for field in fields(Settings)})


def _check_features(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Refuse --features images without --encoder, the reverse, and with flags that are for volumes."""
    if (given.features == "images") != (given.encoder is not None):
        lacking = "--encoder DIR" if given.encoder is None else "--features images"
        raise UsageError(f"--features images and --encoder DIR belong together: add {lacking}, or leave both out.")
    of_volumes = [
        action.option_strings[0]
        for action in parser._actions
        if action.dest in OF_VOLUMES and getattr(given, action.dest) != parser.get_default(action.dest)
    ]
    if given.encoder is not None and of_volumes:
        raise UsageError(f"{', '.join(of_volumes)}: not with --features images. Leave one out.")


def _without_effect(parser: argparse.ArgumentParser, given: argparse.Namespace) -> list[tuple[str, str]]:
    """Flags given that only the other level knows, or that need another, and where they have no effect."""
    groups = ("group level",) if given.level == "participant" else ("images", "ensemble")
    where = dict.fromkeys(groups, f"at the {given.level} level")
    where |= {} if given.output_spaces else {"template space": "without --output-spaces"}
    return [
        (action.option_strings[0], where[group.title])
        for group in parser._action_groups
        if group.title in where
        for action in group._group_actions
        if action.dest not in BOTH_LEVELS and getattr(given, action.dest) != parser.get_default(action.dest)
    ]


def dash_flag(argument: str) -> str:
    """Spell a flag with dashes; values stay as they are.

    >>> dash_flag("--work_dir=my_dir"), dash_flag("my_dir")
    ('--work-dir=my_dir', 'my_dir')
    """
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if re.match(r"--\w", name) else argument


def read_config(parser: argparse.ArgumentParser, path: Path) -> argparse.Namespace:
    """What the flags in a TOML file say: their names without ``--``, with dashes or underscores.

    `UsageError` if it is not TOML, or holds an unknown flag or a value that the flag does not take.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    actions = parser._option_string_actions
    arguments = ["in", "out", "level"]  # those of the command line replace them
    for name, value in read_file("--config-file", path, "TOML", tomllib.loads).items():
        flag = dash_flag(f"--{name}")
        if flag not in actions or flag in NOT_IN_CONFIG:
            raise UsageError(f"--config-file {path}: unknown flag {name!r}.")
        # A value of another wrong kind becomes an argument that the parser refuses.
        if actions[flag].nargs == 0:
            if not isinstance(value, int) or value not in range(10):  # or true, false
                raise UsageError(f"--config-file {path}: {name} = {value!r}: write true or false.")
            arguments += [flag] * value
        elif actions[flag].nargs == "+" and isinstance(value, list):
            arguments += [flag, *map(str, value)]
        else:
            arguments.append(f"{flag}={value}")
    try:
        return parser.parse_args(arguments)
    except UsageError as error:
        raise UsageError(f"--config-file {path}: {error}") from error


def matching(pattern: str, problem: str) -> Callable[[str], str]:
    """Return what refuses texts that do not match a pattern, and leaves others as they are."""

    def read(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ArgumentTypeError(f"{text!r} {problem}")
        return text

    return read


_LABEL = "is not a BIDS label of letters and digits. Give labels, not paths, separated by spaces"
participant_label = matching("(sub-)?[0-9a-zA-Z+]+", _LABEL)
session_label = matching("(ses-)?[0-9a-zA-Z+]+", _LABEL)
member_names = matching(
    "[0-9a-zA-Z,]*[0-9a-zA-Z][0-9a-zA-Z,]*", "is not a family (all, mca, seed, ieee) or a member such as mca01"
)
device_name = matching(r"auto|cpu|cuda(:\d+)?", "is none of auto, cpu, cuda, cuda:0, ...")

output_space = matching(
    f"{SPACE}(:res-0*[12])?", f"is not an output space that there is: use {SPACE} (1 mm) or {SPACE}:res-2 (2 mm)"
)


def split_members(texts: Iterable[str]) -> tuple[str, ...]:
    """Names of members, each once; ``["mca,seed01,", "mca"]`` are mca and seed01."""
    return tuple(dict.fromkeys(name for text in texts for name in text.split(",") if name))


def whole_number(low: int, high: int = 2**32 - 1) -> Callable[[str], int]:
    """Return what reads a whole number from `low` to `high`."""

    def read(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or not low <= int(text) <= high:
            raise ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return read


def memory_gb(text: str) -> float:
    """Memory in GiB (what nipype calls GB), 1 GiB = 1024 MiB as Slurm counts."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise ArgumentTypeError(f"{text!r} is not an amount of memory such as 8G or 8000M")
    return float(match[1]) * GIB_PER_UNIT[match[2].upper() or "G"]


def absolute_path(text: str) -> Path:
    """Absolute path without ``.`` and ``..``."""
    if not text:
        raise ArgumentTypeError("an empty path")
    return Path(os.path.abspath(os.path.expanduser(text)))


def named_path(text: str) -> tuple[str, Path]:
    """``NAME=PATH`` of an existing file or folder; the name becomes part of file names."""
    name, equals, path = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9]+", name):
        raise ArgumentTypeError(f"{text!r}: use NAME=DIR with a name of letters and digits, e.g. freesurfer=/data/fs")
    found = absolute_path(path)
    if not os.path.exists(found):
        raise ArgumentTypeError(f"{found}: no such file or folder")
    return name, found


def existing_file(text: str) -> Path:
    """Absolute path of an existing file."""
    path = absolute_path(text)
    if not os.path.isfile(path):
        raise ArgumentTypeError(f"{path}: no such file")
    return path


def ensemble_name(text: str) -> str:
    """Name of a shipped ensemble, or the absolute path of an ensemble's folder."""
    return str(absolute_path(text)) if os.sep in text else text


def read_file(flag: str, path: Path, form: str, parse: Callable[[str], Any]) -> Any:
    """Content of the settings file of a flag; `UsageError` if it cannot be read or parsed."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{flag} {path}: cannot read it as {form}: {error}.") from error


def read_bids_filters(path: Path) -> dict[str, dict]:
    """Filters of a ``--bids-filter-file`` as nipreps write them, values unchanged; raises as `read_file`.

    Queries other than ``t1w`` are kept and have no effect: one file serves several tools.
    """
    flag = "--bids-filter-file"
    filters = read_file(flag, path, "JSON", json.loads)
    if not isinstance(filters, dict) or not all(isinstance(v, dict) for v in filters.values()):
        raise UsageError(f'{flag} {path}: expected a form like {{"t1w": {{"session": "01"}}}}.')
    for name in filters:
        if name != "t1w" and difflib.get_close_matches(name.lower(), ["t1w"], cutoff=0.75):
            raise UsageError(f"{flag} {path}: unknown query {name!r}. The query for T1w images is 't1w'.")
    return filters


def read_plugin(path: Path) -> Mapping[str, Any]:
    """Nipype plugin settings of a ``--use-plugin`` YAML file; raises as `read_file`."""
    plugin = read_file("--use-plugin", path, "YAML", yaml.safe_load)
    if not isinstance(plugin, dict) or not isinstance(plugin.get("plugin"), str):
        raise UsageError(f"--use-plugin {path}: expected 'plugin: NAME' and 'plugin_args: {{...}}'.")
    if not isinstance(plugin.setdefault("plugin_args", {}), dict):
        raise UsageError(f"--use-plugin {path}: plugin_args must be a mapping.")
    return plugin


def check_paths(bids_dir: Path, output_dir: Path, work_dir: Path, freesurfer_dir: Path | None = None) -> None:
    """Refuse directories that would lose or mix up data; nothing is created.

    The outputs may lie inside the input only below ``derivatives/``, as BIDS Apps customarily do. `NoInputError` if the
    input is no readable directory; `UsageError` if one directory lies in another where it must not, or the output
    belongs to another tool; `OutputError` if the output or work directory cannot be written.
    """
    if not os.path.isdir(bids_dir):
        kind = "is not a directory" if os.path.exists(bids_dir) else "does not exist"
        raise NoInputError(f"{bids_dir}: the BIDS directory {kind}.")
    # Links are followed: two names may mean one folder.
    source, work = (Path(os.path.realpath(path)) for path in (bids_dir, work_dir))
    named = {"output": output_dir} | ({"FreeSurfer": freesurfer_dir} if freesurfer_dir else {})
    outputs = {name: Path(os.path.realpath(path)) for name, path in named.items()}
    for name, output in outputs.items():
        if output.is_relative_to(source) and source / "derivatives" not in output.parents:
            folder = "bids_varaug" if name == "output" else "freesurfer"
            raise UsageError(
                f"{named[name]}: the {name} directory must lie outside of the input dataset or below its derivatives/, "
                f"for example {bids_dir / 'derivatives' / folder}."
            )
    if outputs["output"] == outputs.get("FreeSurfer"):
        raise UsageError(
            f"{freesurfer_dir}: this is the output directory. Choose another --freesurfer-dir, for example "
            f"{output_dir / 'sourcedata' / 'freesurfer'}."
        )
    # Whoever deletes the work directory by hand must not delete the others.
    if (
        work.is_relative_to(source)
        or source.is_relative_to(work)
        or any(output.is_relative_to(work) for output in outputs.values())
    ):
        raise UsageError(
            f"{work_dir}: the work directory must not be inside the input dataset, nor contain it or the output "
            "directory. Choose another -w."
        )
    for name, path in (named | {"work": work_dir}).items():
        _check_writable(name, path)
    _check_not_foreign(output_dir)


def _check_writable(name: str, path: Path) -> None:
    """Refuse a directory that exists and is not writable, or cannot be created."""
    existing = path
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not os.path.isdir(existing):
        what = "a file" if os.path.exists(existing) else "a dangling link"
        raise OutputError(f"{existing}: the {name} directory cannot be here: this is {what}.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(
            f"{path}: the {name} directory cannot be written (no permission in {existing}). Change its permissions, "
            "mount it writable, or choose another."
        )


def _check_not_foreign(output_dir: Path) -> None:
    """Refuse to write into a raw dataset or the derivatives of another tool."""
    try:
        description = json.loads((output_dir / "dataset_description.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # absent or damaged: there is nothing worth keeping, it will be replaced
    if not isinstance(description, dict):
        return
    if description.get("DatasetType", "raw") != "derivative":
        raise UsageError(f"{output_dir}: this is a raw BIDS dataset, not an output directory.")
    generated = description.get("GeneratedBy")
    tools = [tool.get("Name") for tool in generated if isinstance(tool, dict)] if isinstance(generated, list) else []
    if tools and "bids_varaug" not in tools:
        raise UsageError(
            f"{output_dir}: contains the derivatives of {', '.join(map(str, tools))}. Choose another output directory."
        )
