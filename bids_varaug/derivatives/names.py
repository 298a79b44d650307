"""The one table of outputs: names, schema status, units and meaning of each.

Writing, ``.bidsignore``, sidecars, the README's table and the tests read it; a new output is a new row of `OUTPUTS`.
What the columns of tables mean is in ``data/templates/columns.tsv``.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path

from bids_varaug.inputs.scans import Scan
from bids_varaug.models.ensemble import Ensemble, Member
from bids_varaug.settings import Settings

SEGMENTATION = "varaug"
DATASET_DESCRIPTION = "dataset_description.json"
DESCRIPTIONS_TABLE = "descriptions.tsv"
LOOKUP_TABLE = f"seg-{SEGMENTATION}_dseg.tsv"
GROUP_REPORT = "group_brainage.html"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes
    ----------
    heading, form : in reports, see `reports.html.tabulate`
    unit : as BIDS writes it, "" where there is none
    description : for sidecars, and for who points at the heading
    """

    heading: str
    form: str
    unit: str
    description: str


@cache
def _all_columns() -> dict[str, dict[str, Column]]:
    path = files("bids_varaug") / "data" / "templates" / "columns.tsv"
    tables: dict[str, dict[str, Column]] = defaultdict(dict)
    with path.open(encoding="utf-8") as stream:
        for table, name, *values in list(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]:
            tables[table][name] = Column(*values)
    return tables


def table_columns(table: str) -> dict[str, Column]:
    """Columns of a table in ``data/templates/columns.tsv``, by name."""
    return dict(_all_columns()[table])


def _region_columns() -> dict[str, Column]:
    """Columns of the table of regions: measures over all members, then within each family, then verdicts."""
    columns = table_columns("regions")
    judged = {name: columns.pop(name) for name in ("verdict", "reason", "volume_low", "volume_high")}
    within = {
        f"{name}_{family}": Column(
            f"{column.heading} {family}", column.form, column.unit, f"As {name}, within the {family} family"
        )
        for family in ("mca", "seed", "rr")
        for name, column in columns.items()
        if name not in ("index", "name")
    }
    return columns | within | judged


@dataclass(frozen=True)
class Output:
    """One file that is written for each T1w image.

    Attributes
    ----------
    key : name in the code
    entities : those that follow the T1w's own, in BIDS order; ``{member}`` stands for the id of a member, or
        of a family
    suffix : of the file name
    description : for the sidecar and the README
    units : of the voxels; None for labels and tables
    columns : of a table, by name
    extension : of the file name
    """

    key: str
    entities: Mapping[str, str]
    suffix: str
    description: str
    units: str | None = None
    columns: Mapping[str, Column] = field(default_factory=dict)
    extension: str = ".nii.gz"

    @property
    def schema_valid(self) -> bool:
        """Whether BIDS has such a name; otherwise ``.bidsignore`` must list it."""
        return self.suffix not in ("statmap", "morph")

    @property
    def per_member(self) -> bool:
        """Whether there is one such file for each member or family."""
        return "{member}" in self.entities.values()

    def name(self, prefix: str, member: str | None = None) -> str:
        """File name after the prefix of a T1w image.

        Raises
        ------
        ValueError
            If `member` is missing, or given where the output is of no single member.

        Examples
        --------
        >>> OUTPUTS["member_dseg"].name("sub-01", member="mca01")
        'sub-01_seg-varaug_desc-mca01_dseg.nii.gz'
        """
        if self.per_member != (member is not None):
            raise ValueError(f"{self.key}: member={member!r}, but per_member={self.per_member}")
        middle = "".join(f"_{name}-{value}" for name, value in self.entities.items())
        return f"{prefix}{middle.format(member=member)}_{self.suffix}{self.extension}"

    def path(self, output_dir: Path, scan: Scan, member: str | None = None) -> Path:
        """Absolute path of the output of one T1w image."""
        return Path(output_dir) / Path(scan.relative).parent / self.name(scan.prefix, member)

    def sidecar(self, output_dir: Path, scan: Scan, member: str | None = None) -> Path:
        """JSON sidecar; an image and a table of the same name share it."""
        path = self.path(output_dir, scan, member)
        return path.with_name(path.name.removesuffix(self.extension) + ".json")


OF_FAMILY = "_of_family"
"""Ends the key of a map of the members of one family, whose ``{member}`` is the family."""
_SEG = {"seg": SEGMENTATION}
_FAMILY = {"desc": "{member}"}
_ROWS = (
    Output("consensus_dseg", {**_SEG, "desc": "consensus"}, "dseg",
           "Consensus labels: largest mean posterior over the perturbed members."),
    Output("ieee_dseg", {**_SEG, "desc": "ieee"}, "dseg",
           "Labels of the unperturbed baseline member."),
    Output("member_dseg", {**_SEG, "desc": "{member}"}, "dseg",
           "Labels of one member (with --write-members)."),
    Output("mean_probseg", {**_SEG, "desc": "mean"}, "probseg",
           "Mean posterior over the perturbed members, one volume per label of LabelMap."),
    Output("brain_mask", {"desc": "brain"}, "mask",
           "Voxels of any structure of the consensus."),
    Output("unreliable_mask", {"label": "unreliable"}, "mask",
           "Voxels whose consensus label too few perturbed members chose, see Threshold."),
    Output("entropy", {**_SEG, "stat": "entropy"}, "statmap",
           "Shannon entropy of the perturbed members' votes.", "bit"),
    Output("sigbits", {**_SEG, "stat": "sigbits"}, "statmap",
           "Significant bits of the consensus label's posterior over the perturbed members.", "bit"),
    Output("std", {**_SEG, "stat": "std"}, "statmap",
           "Standard deviation of the consensus label's posterior over the perturbed members.", "1"),
    Output("regions_tsv", {**_SEG, "desc": "consensus"}, "dseg",
           "Volumes of each structure and how much the members disagree about it.",
           columns=_region_columns(), extension=".tsv"),
    Output("members_tsv", {**_SEG, "desc": "members"}, "morph",
           "Volume of each structure in each member.", columns=table_columns("volumes"), extension=".tsv"),
    Output("entropy_of_family", {**_SEG, "stat": "entropy", **_FAMILY}, "statmap",
           "Shannon entropy of one family's members' votes. With --family-maps.", "bit"),
    Output("sigbits_of_family", {**_SEG, "stat": "sigbits", **_FAMILY}, "statmap",
           "Significant bits of the consensus label's posterior over one family's members. With --family-maps.", "bit"),
    Output("std_of_family", {**_SEG, "stat": "std", **_FAMILY}, "statmap",
           "Standard deviation of the consensus label's posterior over one family's members. With --family-maps.", "1"),
    Output("unreliable_mask_of_family", {"label": "unreliable", **_FAMILY}, "mask",
           "Voxels whose consensus label too few members of one family chose, see Threshold. With --family-maps."),
)  # fmt: skip
OUTPUTS: dict[str, Output] = {output.key: output for output in _ROWS}


@dataclass(frozen=True)
class ScanRequest:
    """Whose derivatives to write or show, and from which members (in the order of the counts)."""

    settings: Settings
    scan: Scan
    ensemble: Ensemble
    members: tuple[Member, ...]

    @property
    def perturbed(self) -> tuple[Member, ...]:
        """Members of consensus and spread; the baseline alone where there is no other."""
        return tuple(m for m in self.members if not m.is_baseline) or self.members

    def path(self, key: str, member: str | None = None) -> Path:
        """Absolute path of one of the `OUTPUTS`."""
        return OUTPUTS[key].path(self.settings.output_dir, self.scan, member)

    def sidecar(self, key: str, member: str | None = None) -> Path:
        """Absolute path of its JSON sidecar."""
        return OUTPUTS[key].sidecar(self.settings.output_dir, self.scan, member)


def report(output_dir: Path, subject: str) -> Path:
    """HTML report of one participant (label without ``sub-``)."""
    return Path(output_dir) / f"sub-{subject}.html"


def logs(output_dir: Path) -> Path:
    """Folder of run settings, citation text and crash files."""
    return Path(output_dir) / "logs"


def bidsignore_lines() -> list[str]:
    """Patterns of what BIDS has no name for: some outputs, reports, figures and models."""
    suffixes = {output.suffix for output in OUTPUTS.values() if not output.schema_valid}
    # 'figures/' would match a folder's name only, and the validator still look inside.
    return ["*.html", "figures", "models", *(f"*_{suffix}.*" for suffix in sorted(suffixes))]
