"""The derivatives of one T1w image, on its own grid."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numba
import numpy as np
import pandas as pd
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import FileBasedHeader
from nibabel.spatialimages import SpatialImage

from bids_varaug.derivatives.freesurfer import write_fastsurfer, write_freesurfer
from bids_varaug.derivatives.io import write_output, write_table
from bids_varaug.derivatives.names import ALL_OUTPUTS, BRAIN_VOLUMES, OF_FAMILY, OUTPUTS, ScanRequest
from bids_varaug.derivatives.provenance import SETTINGS_KEY, run_origin, shown_settings, sidecar_origin
from bids_varaug.derivatives.sidecars import describe_columns, sidecar
from bids_varaug.errors import UserError
from bids_varaug.files import write_json
from bids_varaug.images.conform import POSTERIOR_SCALE, Geometry, insert, resample_map
from bids_varaug.images.load import voxel_volume
from bids_varaug.inputs.participants import read_people
from bids_varaug.inputs.tables import prefixed
from bids_varaug.segmentation.brain import brain_mask
from bids_varaug.segmentation.fuse import Summary, load_posterior
from bids_varaug.variability import quality
from bids_varaug.variability.expected_dice import CALIBRATED_FAMILIES, describe_calibration, expected_dice
from bids_varaug.variability.measures import (
    ALL,
    FLOAT32_BITS,
    RegionCounts,
    group_members,
    members_table,
    region_table,
    suffix_of,
)
from bids_varaug.variability.quality import find_warnings

# A brain-extracted image holds little beside the structures; a head holds two to three times more.
_SKULL_STRIPPED_BELOW = 1.7
# What a map of the spread is outside the head box, where every member says background with certainty.
_OF_SPREAD = {"mutual_information": 0.0, "entropy": 0.0, "std": 0.0, "sigbits": FLOAT32_BITS}
_CALIBRATED = ("total_entropy", "mutual_information")
JsonObject = Mapping[str, Any]
_TEMPERATURE_TEXT = (
    "The members' mean posterior p is given as p^(1/Temperature), scaled to sum to 1; found on images that training "
    "left out"
)
_THRESHOLD_TEXT = (
    "Probability that the consensus label is wrong, from which on a voxel counts as unreliable: one minus the largest "
    "value of desc-mean_probseg"
)


@dataclass
class ScanWriter:
    """Writes one scan's outputs, each with its sidecar, and remembers them."""

    request: ScanRequest
    affine: np.ndarray
    header: FileBasedHeader  # of the T1w
    skull_stripped: bool
    brain: np.ndarray  # mask
    written: list[Path] = field(default_factory=list)

    def image(
        self,
        key: str,
        data: np.ndarray,
        member: str | None = None,
        extra: JsonObject | None = None,
        affine: np.ndarray | None = None,
    ) -> None:
        """Write an image on the T1w's grid, or that of `affine`, real numbers in steps; `extra` goes to its sidecar."""
        output = OUTPUTS[key]
        if key.removesuffix(OF_FAMILY) == "sigbits":  # the 24 bits of the background would hide the brain
            data = data * self.brain
        path, affine = self.request.path(key, member), self.affine if affine is None else affine
        precision = write_output(output, data, affine, path, self.header, **header_fields(self.request, key))
        self.written.append(path)
        self.sidecar(key, member, {**precision, **(extra or {})})

    def sidecar(self, key: str, member: str | None = None, extra: JsonObject | None = None) -> None:
        """Write the sidecar of an output."""
        content = sidecar(self.request, key, member, skull_stripped=self.skull_stripped, extra=extra)
        write_json(content, self.request.sidecar(key, member))


def header_fields(request: ScanRequest, key: str) -> dict[str, Any]:
    """Fields of the header of an output, beside those of its kind: of label maps, the largest label and the table."""
    if ALL_OUTPUTS[key].suffix != "dseg":
        return {}
    largest = max(label.index for label in request.ensemble.labels)
    return {"cal_max": largest, "aux_file": request.lookup_table.name}


def write_scan(
    request: ScanRequest, geometry_file: Path, posteriors: Sequence[Path], summary: Summary, folder: Path,
    num_threads: int = 1,
) -> tuple[list[Path], list[str]]:  # fmt: skip
    """Bring everything to the T1w's own grid and write it; return the files (without sidecars) and what to warn of.

    `posteriors` are the members' files; `folder` is scratch space for the dense one, which may not fit in memory.
    """
    numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]  # set late
    geometry, ensemble = Geometry.load(geometry_file), request.ensemble
    ids = np.array([label.index for label in ensemble.labels])
    ids = ids.astype(np.int16 if ids.max() < 2**15 else np.int32)
    dense_file = folder / "posterior.npy"
    dense = np.lib.format.open_memmap(dense_file, "w+", np.uint8, (*geometry.native_shape, len(ids)))
    mean = load_posterior(summary.mean)
    consensus = mean.to_native(geometry, dense, ensemble.temperature)
    brain, labels = brain_mask(mean.labels > 0, consensus > 0, geometry), ids[consensus]
    affine, image = geometry.native_affine, cast(SpatialImage, nib.load(request.scan.path))
    voxel = voxel_volume(affine)
    stripped = is_skull_stripped(geometry, consensus)
    writer = ScanWriter(request, affine, image.header, skull_stripped=stripped, brain=brain)
    regions, members, limits = _tables(request, summary.counts, geometry)
    error_probability = 1 - np.float32(POSTERIOR_SCALE) * dense.max(axis=-1)
    t1w = np.asanyarray(image.dataobj).reshape(geometry.native_shape)
    volumes = {"brain": float(regions["volume_mean"].sum()), "brain_mask": float(np.count_nonzero(brain)) * voxel}
    about_brain = {n: {"Value": round(volumes[n], 1)} | text for n, text in describe_columns(BRAIN_VOLUMES).items()}
    warnings = find_warnings(voxel_sizes(affine), t1w, labels)
    few = quality.describe_families(Counter(member.family for member in request.perturbed))
    quality_keys = {
        "Volumes": about_brain,
        "VolumeLimits": limits,
        "VerdictThresholds": quality.describe_thresholds(),
        "ExpectedDiceDescription": describe_calibration(ensemble.quality),
        "LookFirst": quality.look_first(regions, labels, error_probability, affine),
        "Warnings": [*geometry.warnings, *warnings, *few, *quality.describe_verdicts(regions)],
    }
    writer.image("consensus_dseg", labels, extra=quality_keys)
    writer.image("brain_mask", brain)
    calibration = {"Temperature": ensemble.temperature, "TemperatureDescription": _TEMPERATURE_TEXT}
    writer.image("mean_probseg", dense, extra=calibration)
    threshold = {"Threshold": quality.UNRELIABLE_FROM, "ThresholdDescription": _THRESHOLD_TEXT} | calibration
    writer.image("unreliable_mask", error_probability >= quality.UNRELIABLE_FROM, extra=threshold)
    if request.settings.freesurfer_dir is not None and not ensemble.is_fastsurfer:
        writer.written += write_freesurfer(request, labels, affine, t1w, regions, volumes)
    del dense, mean, consensus, labels, t1w, image, error_probability
    dense_file.unlink()
    for member, path in zip(request.members, posteriors, strict=True):
        if member.is_baseline:
            writer.image("ieee_dseg", ids[load_posterior(path).to_native(geometry)])
        elif request.settings.write_members:
            writer.image("member_dseg", ids[load_posterior(path).to_native(geometry)], member.id)
    if ensemble.is_fastsurfer:
        every = request.settings.write_members
        pairs = zip(request.members, posteriors, strict=True)
        alone = [(member.id, path) for member, path in pairs if member.is_baseline or every]
        for name, path in (("consensus", summary.mean), *alone):
            whole = insert(load_posterior(path).labels, geometry.box, geometry.conformed_shape)
            grid = {"Resolution": f"FastSurfer's grid: {geometry.voxel_size:g} mm, axes to the left, down and ahead"}
            if request.settings.whole_voxels:
                grid["Resolution"] += ", moved by half a voxel (--whole-voxels)"
            writer.image("conformed_dseg", ids[whole], name, grid, affine=geometry.conformed_affine)
            if request.settings.freesurfer_dir is not None and name == "consensus":
                writer.written += write_fastsurfer(request, ids[whole], geometry.conformed_affine, regions)
    _write_maps(writer, summary.maps, geometry, calibration)
    # The table of regions shares the sidecar of the consensus labels.
    for key, table in (("regions_tsv", regions), ("members_tsv", members)):
        writer.written.append(write_table(table, request.path(key)))
    _remove_outdated(request, writer.written)
    # The group level must not mix ensembles or versions, and --reports-only asks for no flags.
    made = run_origin(request).to_json() | {SETTINGS_KEY: shown_settings(request.settings)}
    writer.sidecar("members_tsv", extra=made)
    return writer.written, [*warnings, *quality.describe_verdicts(regions, n_named=3)]


def is_skull_stripped(geometry: Geometry, brain: np.ndarray) -> bool:
    """Whether an image is brain-extracted, of which `brain` are the labelled voxels of the native grid."""
    volume = float(np.count_nonzero(brain)) * voxel_volume(geometry.native_affine)
    return geometry.foreground_volume < _SKULL_STRIPPED_BELOW * volume


def _write_maps(writer: ScanWriter, maps_file: Path, geometry: Geometry, calibration: JsonObject) -> None:
    """Write the maps of all perturbed members, and of the families for which there are maps."""
    request = writer.request
    fills = {"total_entropy": 0.0}
    if len(request.perturbed) > 1:
        fills |= _OF_SPREAD
    else:
        # The spread of an earlier run's members would be taken for that of this consensus.
        for key in _OF_SPREAD:
            request.path(key).unlink(missing_ok=True)
            request.sidecar(key).unlink(missing_ok=True)
    with np.load(maps_file) as maps:
        for group in group_members([member.family for member in request.members]):
            ending = suffix_of(group)
            if f"entropy{ending}" not in maps:
                continue
            family, of_family = (None, "") if group == ALL else (group, OF_FAMILY)
            for key, fill in fills.items():
                values = resample_map(maps[key + ending], geometry, fill=fill)
                writer.image(key + of_family, values, family, calibration if key in _CALIBRATED else None)


def _tables(request: ScanRequest, counts_file: Path, geometry: Geometry) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Tables of regions, with verdicts, and of members; whose limits of volume apply."""
    families = [member.family for member in request.members]
    with np.load(counts_file) as arrays:
        counts = RegionCounts(arrays["volumes"], arrays["intersections"])
        entropy = {
            group: arrays[f"entropy_mean{suffix_of(group)}"]
            for group, members in group_members(families).items()
            if group == ALL or len(members) > 1
        }
        soft_dice, uncertainty = arrays["soft_dice"][1:], arrays["uncertainty_mean"][1:]
    labels, voxel = request.ensemble.labels, voxel_volume(geometry.conformed_affine)
    age, sex, reason = _age_and_sex(request)
    table = region_table(counts, families, labels, voxel, entropy)
    coarser = max(voxel, voxel_volume(geometry.native_affine))
    pair_dice, voxels = table["dice_mean"].to_numpy(), table["volume_mean"].to_numpy() / coarser
    if {member.family for member in request.perturbed} != CALIBRATED_FAMILIES:
        pair_dice = np.full(len(table), np.nan)  # others agree more, or less, than those of the calibration
    expected = expected_dice(request.ensemble.quality, soft_dice, pair_dice, voxels)
    table = table.join(expected).assign(uncertainty_mean=uncertainty)
    regions = quality.judge_regions(table, Counter(member.family for member in request.perturbed), coarser, age, sex)
    volumes = members_table(counts, [member.id for member in request.members], families, labels, voxel)
    return regions, volumes, f"{quality.describe_limits(age, sex)}{reason}."


def _age_and_sex(request: ScanRequest) -> tuple[float | None, str | None, str]:
    """Age and sex at the scan, None where the tables of the dataset lack them, and why."""
    settings, scan = request.settings, request.scan
    subject = prefixed(scan.subject)
    try:
        people = read_people(
            settings.bids_dir, age_column=settings.age_column, sex_column=settings.sex_column,
            require_age=False, only=subject,
        )  # fmt: skip
    except (UserError, OSError) as error:  # no reason to lose the segmentation
        return None, None, " ".join(f" ({error})".splitlines())
    person = people.find(subject, scan.session and prefixed(scan.session, "ses"))
    if person is None:
        return None, None, ""
    return person.age, person.sex, f" ({person.reason})" if person.reason else ""


def _remove_outdated(request: ScanRequest, written: list[Path]) -> None:
    """Remove what a run with another ensemble left of this image, and this run did not replace.

    Labels of members would be taken for those of this run.
    """
    path, run = request.sidecar("members_tsv"), run_origin(request)
    try:
        before = sidecar_origin(json.loads(path.read_bytes()), run.file)
    except (OSError, ValueError):
        return  # nothing was finished before
    if before == run:
        return
    stems = {file.name.partition(".")[0] for file in written}  # which outputs share with their sidecars
    for old in path.parent.iterdir():
        starts = (f"{request.scan.prefix}_{start}" for start in ("seg-", "space-", "from-"))
        ours = old.name.startswith(tuple(starts))
        if ours and old.name.partition(".")[0] not in stems:
            old.unlink()
