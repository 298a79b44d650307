"""The one table of outputs: names, units and meaning of each.

Writing, sidecars, the README's table and the tests read `OUTPUTS`. A new output is a new row of
``data/templates/outputs.tsv``; what the columns of tables mean is in ``columns.tsv`` beside it.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from bids_varaug.inputs.scans import Scan
from bids_varaug.models.ensemble import Ensemble, Member
from bids_varaug.registration.space import OutputSpace
from bids_varaug.settings import Settings

DATASET_DESCRIPTION = "dataset_description.json"
DESCRIPTIONS_TABLE = "descriptions.tsv"
OURS = "seg-varaug"
"""Entity of the package's own networks in names; ``Run.segmentation`` takes its place."""
LOOKUP_TABLE = f"{OURS}_dseg.tsv"
FEATURES = "desc-encoder_features.tsv"
"""Ends the name of a table of an image that the group level writes (``--features images``)."""
GROUP_REPORT = "group_brainage.html"
QUALITY_REPORT = "group_quality.html"
MAPS_REPORT = "group_maps.html"
GROUP_MAPS = "group_maps"


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    heading: str  # in reports
    form: str  # how reports write it, see `reports.html.tabulate`
    unit: str  # as BIDS writes it, "" where there is none
    description: str  # for sidecars, and for who points at the heading


def read_template_table(name: str) -> list[list[str]]:
    """Rows of a table of texts in ``data/templates``, without its header."""
    with (files("bids_varaug") / "data" / "templates" / name).open(encoding="utf-8") as stream:
        return list(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]


def table_columns(table: str) -> dict[str, Column]:
    """Columns of a table in ``data/templates/columns.tsv``, by name."""
    return {name: Column(*values) for of, name, *values in read_template_table("columns.tsv") if of == table}


def _columns_of(table: str) -> dict[str, Column]:
    """Columns in the order of the file; of regions, measures over members, within families, then verdicts."""
    columns = table_columns(table)
    if table != "regions":
        return columns
    judged = {name: columns.pop(name) for name in list(columns)[list(columns).index("expected_dice") :]}
    within = {
        f"{name}_{family}": replace(column, description=f"As {name}, within the {family} family")
        for family in ("mca", "seed", "rr")
        for name, column in columns.items()
        if name not in ("index", "name")
    }
    return columns | within | judged


@dataclass(frozen=True)
class Output:
    """One file that is written for each T1w image."""

    key: str  # name in the code
    # Of the name, after the T1w's own entities: {member} is the id of a member, or of a family; {space} a template and
    # {res} its resolution.
    pattern: str
    description: str  # for the sidecar and the README
    units: str  # of the voxels; "" for labels and tables
    per_unit: int  # steps of a unit in which values are stored; 0: as they are, real numbers in as many as fit them
    cal_max: float  # value that viewers show brightest; 0 for labels, whose largest id it is
    columns: Mapping[str, Column]  # of a table

    @property
    def suffix(self) -> str:
        """Last part of the name, e.g. "dseg"."""
        return self.pattern.rpartition("_")[2].partition(".")[0]

    @property
    def extension(self) -> str:
        """``.nii.gz``, ``.tsv`` or ``.h5``."""
        return "." + self.pattern.partition(".")[2]

    @property
    def per_member(self) -> bool:
        """Whether there is one such file for each member or family."""
        return "{member}" in self.pattern

    @property
    def in_space(self) -> bool:
        """Whether there is one such file for each output space."""
        return "{space}" in self.pattern

    def name(self, prefix: str, member: str | None = None, space: OutputSpace | None = None) -> str:
        """File name after the prefix of a T1w image; ValueError if `member` or `space` is missing, or one too many.

        >>> OUTPUTS["member_dseg"].name("sub-01", member="mca01")
        'sub-01_seg-varaug_desc-mca01_dseg.nii.gz'
        """
        if self.per_member != (member is not None):
            raise ValueError(f"{self.key}: member={member!r}, but per_member={self.per_member}")
        if self.in_space != (space is not None):
            raise ValueError(f"{self.key}: space={space!r}, but in_space={self.in_space}")
        where = {"space": space.name, "res": space.entity} if space else {}
        return f"{prefix}_{self.pattern.format(member=member, **where)}"


def ending_of(key: str) -> str:
    """Pattern of what an output's names end with, whichever networks segmented.

    >>> ending_of("members_tsv")
    '_seg-*_desc-members_morph.tsv'
    """
    return OUTPUTS[key].name("").replace(OURS, "seg-*")


def prefix_of(name: str) -> str:
    """Entities of the T1w image in the name of an output that has ``seg-``."""
    return name.rpartition("_seg-")[0]


BRAIN_VOLUMES = {name: table_columns("group_volumes")[name] for name in ("brain", "brain_mask")}
"""Volumes of the brain as a whole; the intracranial volume is none of them."""
OF_FAMILY = "_of_family"
"""Ends the key of a map of the members of one family, whose ``{member}`` is the family."""
ALL_OUTPUTS: dict[str, Output] = {
    key: Output(key, pattern, description, units, int(per_unit or 0), float(cal_max or 0), _columns_of(columns))
    for key, pattern, units, per_unit, cal_max, columns, description in read_template_table("outputs.tsv")
}
OUTPUTS: dict[str, Output] = {key: output for key, output in ALL_OUTPUTS.items() if not output.in_space}
"""In the T1w's own grid."""
SPACE_OUTPUTS: dict[str, Output] = {key: output for key, output in ALL_OUTPUTS.items() if output.in_space}
"""In the output spaces, and the transforms."""


@dataclass(frozen=True)
class Run:
    """How a run makes derivatives: settings with nothing left open, the ensemble, and its members in their order."""

    settings: Settings
    ensemble: Ensemble
    members: tuple[Member, ...]

    @property
    def segmentation(self) -> str:
        """Entity that says whose segmentation it is."""
        return "seg-fastsurfer" if self.ensemble.is_fastsurfer else OURS

    @property
    def lookup_table(self) -> Path:
        """Table of the labels, at the root."""
        return self.settings.output_dir / LOOKUP_TABLE.replace(OURS, self.segmentation)

    @property
    def voxel_size(self) -> float:
        """Of the network grid, mm."""
        return self.ensemble.voxel_size * (2 if self.settings.sloppy else 1)

    @property
    def perturbed(self) -> tuple[Member, ...]:
        """Members of consensus and spread; the baseline alone where there is no other."""
        return tuple(m for m in self.members if not m.is_baseline) or self.members


@dataclass(frozen=True)
class ScanRequest(Run):
    """A run, and the scan whose derivatives to write or show."""

    scan: Scan

    def path(self, key: str, member: str | None = None, space: OutputSpace | None = None) -> Path:
        """Absolute path of one of the `OUTPUTS`, or the `SPACE_OUTPUTS`."""
        folder = self.settings.output_dir / Path(self.scan.relative).parent
        seg = f"_{self.segmentation}_"
        if space is None:
            return folder / ALL_OUTPUTS[key].name(self.scan.prefix, member).replace(f"_{OURS}_", seg)
        # The image is no longer in its own space; BIDS wants chunk after space.
        name = ALL_OUTPUTS[key].name(re.sub("_space-[^_]+", "", self.scan.prefix), member, space)
        return folder / re.sub("(_chunk-[^_]+)(_space-[^_]+)", r"\2\1", name).replace(f"_{OURS}_", seg)

    def sidecar(self, key: str, member: str | None = None, space: OutputSpace | None = None) -> Path:
        """Absolute path of its JSON sidecar; an image and a table of the same name share it."""
        path = self.path(key, member, space)
        return path.with_name(path.name.removesuffix(ALL_OUTPUTS[key].extension) + ".json")


def report(output_dir: Path, subject: str) -> Path:
    """HTML report of one participant (label without ``sub-``)."""
    return Path(output_dir) / f"sub-{subject}.html"


def logs(output_dir: Path) -> Path:
    """Folder of run settings, citation text and crash files."""
    return Path(output_dir) / "logs"


# What BIDS has no name for (transforms: only in a draft): some outputs, reports, figures, models; phenotype tables by
# image. 'figures/' would match a folder's name only, and the validator still look inside.
_IGNORED = (
    "*.html", "figures", GROUP_MAPS, "models", "phenotype/changes.*", "phenotype/volumes.*", "*_features.*",
    "*_morph.*", "*_statmap.*", "*_xfm.*",
)  # fmt: skip
BIDSIGNORE = "".join(f"{pattern}\n" for pattern in _IGNORED)
