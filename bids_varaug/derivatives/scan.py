"""The derivatives of one T1w image, on its own grid."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numba
import numpy as np
import pandas as pd
from nibabel.affines import voxel_sizes

from bids_varaug.atomic import write_json
from bids_varaug.derivatives.names import OF_FAMILY, SEGMENTATION, ScanRequest
from bids_varaug.derivatives.sidecars import GRIDS_KEY, package_version, sidecar
from bids_varaug.derivatives.write import write_image, write_image_series, write_table
from bids_varaug.errors import UserError
from bids_varaug.images.affine import voxel_volume
from bids_varaug.images.conform import (
    POSTERIOR_SCALE,
    Geometry,
    resample_map,
    resample_posterior,
)
from bids_varaug.inputs.participants import prefixed, read_people
from bids_varaug.machine import compiled
from bids_varaug.segmentation.posterior import SparsePosterior, load_posterior
from bids_varaug.variability.maps import FLOAT32_BITS, UNRELIABLE_BELOW
from bids_varaug.variability.plausibility import find_warnings
from bids_varaug.variability.quality import (
    describe_families,
    describe_limits,
    describe_thresholds,
    describe_verdicts,
    judge_regions,
)
from bids_varaug.variability.regions import (
    ALL,
    RegionCounts,
    group_members,
    members_table,
    region_table,
    suffix_of,
)

# A brain-extracted image holds little beside the structures; a head holds two to three times more.
_SKULL_STRIPPED_BELOW = 1.7
_TURNED = 8  # classes at once
# What a map is outside the head box, where every member says background with certainty.
_OUTSIDE = {"entropy": 0.0, "std": 0.0, "sigbits": FLOAT32_BITS}


@dataclass(frozen=True)
class Intermediate:
    """Files of the work directory that the derivatives are made of."""

    geometry: Path
    mean: Path
    maps: Path
    counts: Path
    posteriors: tuple[Path, ...]


class ScanWriter:
    """Writes one scan's outputs, each with its sidecar, and remembers them."""

    def __init__(self, request: ScanRequest, geometry: Geometry, skull_stripped: bool):
        self.request = request
        self.geometry = geometry
        self.skull_stripped = skull_stripped
        self.header = nib.load(request.scan.path).header
        self.written: list[Path] = []
        self.ids = np.array([label.index for label in request.ensemble.labels], np.int32)

    def labels(self, key: str, classes: np.ndarray, member: str | None = None, **extra: Any) -> None:
        """Write class indices (X, Y, Z) uint8 as label ids."""
        dtype = np.int16 if self.ids.max() < 2**15 else np.int32
        self._image(key, self.ids.astype(dtype)[classes], member, **extra)

    def mask(self, key: str, mask: np.ndarray, member: str | None = None, **extra: Any) -> None:
        """Write a mask (X, Y, Z) bool."""
        self._image(key, mask.astype(np.uint8), member, **extra)

    def scalar_map(self, key: str, values: np.ndarray, family: str | None = None) -> None:
        """Bring a map of the head box to the native grid and write it."""
        fill = _OUTSIDE[key.removesuffix(OF_FAMILY)]
        self._image(key, resample_map(values, self.geometry, fill=fill), family)

    def posterior(self, key: str, quantised: np.ndarray) -> None:
        """Write (X, Y, Z, K) uint8 steps of `POSTERIOR_SCALE`, a volume a label."""
        path = self.request.path(key)
        write_image_series(
            _volumes(quantised), quantised.shape, self.geometry.native_affine, path, np.uint8,
            self.header, POSTERIOR_SCALE,
        )  # fmt: skip
        self._sidecar(
            key,
            Temperature=self.request.ensemble.temperature,
            TemperatureDescription="The members' mean posterior p is given as p^(1/Temperature), scaled to sum to 1; "
            "found on images that training left out",
        )
        self.written.append(path)

    def table(self, key: str, table: pd.DataFrame) -> None:
        """Write a TSV; that of the regions shares the sidecar of the consensus labels."""
        path = self.request.path(key)
        write_table(table, path)
        if key == "members_tsv":  # the group level must not mix ensembles or versions
            self._remove_strangers()
            self._sidecar(key, **self._origin())
        self.written.append(path)

    def _origin(self) -> dict:
        """Which weights and which version of the package made the numbers."""
        ensemble, members = self.request.ensemble, self.request.members
        seeds = {member.id: member.seed for member in members if member.is_rounded}
        return {
            "Ensemble": {
                "Name": ensemble.name,
                "Version": ensemble.version,
                "SHA256": {member.id: member.sha256 for member in members},
                **({"Seed": seeds} if seeds else {}),
            },
            "GeneratedBy": [{"Name": "bids_varaug", "Version": package_version()}],
        }

    def _remove_strangers(self) -> None:
        """Remove what a run with another ensemble left of this image, and this run did not replace.

        Labels of members would be taken for those of this run.
        """
        settings, scan = self.request.settings, self.request.scan
        path = self.request.sidecar("members_tsv")
        try:
            before = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return  # nothing was finished before
        now = self._origin() | {GRIDS_KEY: settings.grids, "Sloppy": settings.sloppy}
        before = {GRIDS_KEY: 1, "Sloppy": "Warning" in before} | before
        if all(before.get(key) == value for key, value in now.items()):
            return
        stems = {_stem(path) for path in self.written} | {_stem(path)}
        for old in path.parent.iterdir():
            ours = old.name.startswith(f"{scan.prefix}_seg-{SEGMENTATION}_")
            if ours and _stem(old) not in stems:
                old.unlink()

    def remove(self, key: str) -> None:
        """Remove an output of an earlier run, and its sidecar."""
        self.request.path(key).unlink(missing_ok=True)
        self.request.sidecar(key).unlink(missing_ok=True)

    def _image(self, key: str, data: np.ndarray, member: str | None = None, **extra: Any) -> None:
        path = self.request.path(key, member)
        write_image(data, self.geometry.native_affine, path, source_header=self.header)
        self._sidecar(key, member, **extra)
        self.written.append(path)

    def _sidecar(self, key: str, member: str | None = None, **extra: Any) -> None:
        content = sidecar(self.request, key, member, skull_stripped=self.skull_stripped, extra=extra)
        write_json(content, self.request.sidecar(key, member))


def write_scan(
    request: ScanRequest, files: Intermediate, folder: Path, num_threads: int = 1
) -> tuple[list[Path], list[str]]:
    """Bring everything to the T1w's own grid and write it.

    Parameters
    ----------
    folder : scratch space for the dense posterior, which may not fit in memory

    Returns
    -------
    Files written, sidecars left out; what to warn of.
    """
    numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
    geometry = Geometry.load(files.geometry)
    mean = load_posterior(files.mean)
    dense_file = folder / "posterior.npy"
    n_classes = mean.rows.shape[1]
    dense = np.lib.format.open_memmap(dense_file, "w+", np.uint8, (*geometry.native_shape, n_classes))
    consensus = _to_native(mean, geometry, dense, request.ensemble.temperature)
    brain = consensus > 0
    brain_volume = float(brain.sum()) * voxel_volume(geometry.native_affine)
    stripped = geometry.foreground_volume < _SKULL_STRIPPED_BELOW * brain_volume
    writer = ScanWriter(request, geometry, skull_stripped=bool(stripped))
    regions, members, basis = _tables(request, files, geometry)
    t1w = np.asanyarray(nib.load(request.scan.path).dataobj).reshape(geometry.native_shape)
    doubts = find_warnings(voxel_sizes(geometry.native_affine), t1w, writer.ids[consensus])
    told = {
        "VolumeLimits": basis,
        "VerdictThresholds": describe_thresholds(),
        "Warnings": [
            *geometry.warnings,
            *doubts,
            *describe_families(Counter(member.family for member in request.perturbed)),
            *describe_verdicts(regions),
        ],
    }
    writer.labels("consensus_dseg", consensus, **told)
    writer.mask("brain_mask", brain)
    writer.posterior("mean_probseg", dense)
    del dense, consensus, mean, t1w
    dense_file.unlink()
    _write_members(writer, request, files, geometry)
    if request.has_spread:
        _write_spread(writer, files, geometry)
    else:
        # The spread of an earlier run's members would be taken for that of this consensus.
        for key in (*_OUTSIDE, "unreliable_mask"):
            writer.remove(key)
    writer.table("regions_tsv", regions)
    writer.table("members_tsv", members)
    return writer.written, [*doubts, *describe_verdicts(regions, n_named=3)]


def _to_native(sparse: SparsePosterior, geometry: Geometry, *out) -> np.ndarray:
    parts = sparse.offsets, sparse.voxels, sparse.posterior
    return resample_posterior(*parts, geometry, *out)


def _write_members(writer, request: ScanRequest, files: Intermediate, geometry: Geometry) -> None:
    for member, path in zip(request.members, files.posteriors, strict=True):
        if member.is_baseline:
            writer.labels("ieee_dseg", _to_native(load_posterior(path), geometry))
        elif request.settings.write_members:
            labels = _to_native(load_posterior(path), geometry)
            writer.labels("member_dseg", labels, member.id)


def _write_spread(writer: ScanWriter, files: Intermediate, g: Geometry) -> None:
    """Write the maps of all perturbed members, and of the families for which there are maps."""
    families = [member.family for member in writer.request.members]
    with np.load(files.maps) as maps:
        for group in group_members(families):
            if f"entropy{suffix_of(group)}" not in maps:
                continue
            family, ending = (None, "") if group == ALL else (group, OF_FAMILY)
            for key in _OUTSIDE:
                writer.scalar_map(key + ending, maps[key + suffix_of(group)], family)
            mask = maps["unreliable" + suffix_of(group)]
            native = resample_map(mask, g, order=0)
            writer.mask("unreliable_mask" + ending, native, family, Threshold=UNRELIABLE_BELOW,
                        ThresholdDescription="Share of the members that vote for the consensus "
                        "label, below which a voxel counts as unreliable")  # fmt: skip


def _tables(request: ScanRequest, files: Intermediate, g: Geometry) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Tables of regions, with verdicts, and of members; whose limits of volume apply."""
    with np.load(files.counts) as arrays:
        counts = RegionCounts(arrays["volumes"], arrays["intersections"])
        families = [member.family for member in request.members]
        entropy = {
            group: arrays[f"entropy_mean{suffix_of(group)}"]
            for group, members in group_members(families).items()
            if group == ALL or len(members) > 1
        }
    labels, voxel = request.ensemble.labels, voxel_volume(g.conformed_affine)
    regions = region_table(counts, families, labels, voxel, entropy)
    age, sex, doubt = _who(request)
    regions = judge_regions(
        regions,
        Counter(member.family for member in request.perturbed),
        max(voxel, voxel_volume(g.native_affine)),
        age,
        sex,
    )
    ids = [member.id for member in request.members]
    members = members_table(counts, ids, families, labels, voxel)
    return regions, members, f"{describe_limits(age, sex)}{doubt}."


def _who(request: ScanRequest) -> tuple[float | None, str | None, str]:
    """Age and sex at the scan, None where the dataset's tables do not tell, and their error."""
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


def _stem(path: Path) -> str:
    """Name that an output shares with its sidecar."""
    return path.name.partition(".")[0]


def _volumes(quantised: np.ndarray) -> Iterator[np.ndarray]:
    """One class at a time, x fastest as in the file; some together, since K runs fastest here."""
    n_x, n_y, n_z, n_classes = quantised.shape
    for start in range(0, n_classes, _TURNED):
        turned = np.empty((min(_TURNED, n_classes - start), n_z, n_y, n_x), quantised.dtype)
        _turn(quantised, start, turned)
        for volume in turned:
            yield volume.T


@compiled(parallel=True)
def _turn(quantised, start, turned):
    """Turn (X, Y, Z, K) to (K', Z, Y, X); what a thread does at once fits its cache."""
    for y in numba.prange(turned.shape[2]):
        for x in range(turned.shape[3]):
            for z in range(turned.shape[1]):
                for k in range(turned.shape[0]):
                    turned[k, z, y, x] = quantised[x, y, z, start + k]
