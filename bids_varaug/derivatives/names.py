"""The one table of outputs: names, schema status, units and meaning of each.

Writing, ``.bidsignore``, sidecars, the README's table and the tests read it; a new output is a new row of `OUTPUTS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from bids_varaug.inputs.scans import Scan
from bids_varaug.models.ensemble import Ensemble, Member
from bids_varaug.settings import Settings

SEGMENTATION = "varaug"


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
    columns : of a table, name to description and unit (or None)
    extension : of the file name
    """

    key: str
    entities: Mapping[str, str]
    suffix: str
    description: str
    units: str | None = None
    columns: Mapping[str, tuple[str, str | None]] = field(default_factory=dict)
    extension: str = ".nii.gz"

    @property
    def schema_valid(self) -> bool:
        """Whether BIDS has such a name; otherwise ``.bidsignore`` must list it."""
        return self.suffix not in ("statmap", "morph")

    @property
    def per_member(self) -> bool:
        """Whether there is one such file for each member or family."""
        return any("{member}" in value for value in self.entities.values())

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


FAMILIES = (
    "What was perturbed: ieee (nothing), mca and seed (training), rr (inference of the baseline, by random rounding)"
)
_ID = {"index": ("FreeSurfer label id", None), "name": ("Structure", None)}
_MEASURES = {
    "volume_mean": ("Mean volume over the perturbed members", "mm^3"),
    "volume_std": ("Standard deviation of the volume over the perturbed members (N - 1)", "mm^3"),
    "cv": ("Coefficient of variation of the volume: volume_std / volume_mean", None),
    "sigbits": (
        "Significant bits of the volume over the perturbed members: -log2(volume_std / "
        "volume_mean), as in the map of significant bits",
        "bit",
    ),
    "sigbits_lower": (
        "Lower confidence bound of the significant bits: those that a further member would share "
        "with the mean with a probability of 95 %, at a confidence of 95 % (significantdigits, "
        "centred normality hypothesis)",
        "bit",
    ),
    "dice_min": ("Smallest Dice coefficient over pairs of perturbed members", None),
    "dice_mean": ("Mean Dice coefficient over pairs of perturbed members", None),
    "entropy_mean": ("Mean vote entropy inside the consensus structure", "bit"),
}
_REGIONS = {
    **_ID,
    **_MEASURES,
    **{
        f"{measure}_{family}": (f"As {measure}, within the {family} family", unit)
        for family in ("mca", "seed", "rr")
        for measure, (_, unit) in _MEASURES.items()
    },
    "verdict": ("How far the volume can be trusted", None),
    "reason": ("Why the verdict is not good, the worst reason first", None),
    "volume_low": ("Smallest plausible volume, see VolumeLimits", "mm^3"),
    "volume_high": ("Largest plausible volume, see VolumeLimits", "mm^3"),
}
_MEMBERS = {
    "member": ("Member of the ensemble, see descriptions.tsv", None),
    "family": (FAMILIES, None),
    **_ID,
    "volume": ("Volume in this member's segmentation", "mm^3"),
}

_SEG = {"seg": SEGMENTATION}
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
           columns=_REGIONS, extension=".tsv"),
    Output("members_tsv", {**_SEG, "desc": "members"}, "morph",
           "Volume of each structure in each member.", columns=_MEMBERS, extension=".tsv"),
)  # fmt: skip
OUTPUTS: dict[str, Output] = {output.key: output for output in _ROWS}

OF_FAMILY = "_of_family"
"""Ends the key of a map of the members of one family, whose ``{member}`` is the family."""
for _key in ("entropy", "sigbits", "std", "unreliable_mask"):
    _whole = OUTPUTS[_key]
    OUTPUTS[_key + OF_FAMILY] = replace(
        _whole,
        key=_key + OF_FAMILY,
        entities={**_whole.entities, "desc": "{member}"},
        description=_whole.description.replace("the perturbed members", "one family's members").replace(
            "perturbed members", "members of one family"
        )
        + " With --family-maps.",
    )

# Label, description of the desc- entities that are no member's id.
DESCRIPTIONS = {
    "consensus": "Consensus of the perturbed members",
    "mean": "Mean over the perturbed members",
    "brain": "All structures of the consensus together",
    "members": "One row per member and structure",
}

DATASET_DESCRIPTION = "dataset_description.json"
DESCRIPTIONS_TABLE = "descriptions.tsv"
LOOKUP_TABLE = f"seg-{SEGMENTATION}_dseg.tsv"
GROUP_REPORT = "group_brainage.html"


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

    @property
    def has_spread(self) -> bool:
        """Whether there are two perturbed members to disagree."""
        return len(self.perturbed) > 1

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
