"""Features that an encoder makes of whole, brain-extracted images, as a cohort.

Of each image that the participant level segmented, the T1w image and the brain mask are brought to the encoder's grid,
and every member makes features of it. They are kept beside the other derivatives of the image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from bids_varaug import __version__
from bids_varaug.brainage.cohort import Cohort, Gathered, assemble
from bids_varaug.brainage.features import relative_volumes
from bids_varaug.brainage.model_file import ModelError
from bids_varaug.derivatives import names
from bids_varaug.derivatives.io import ENDING, write_table
from bids_varaug.derivatives.provenance import SETTINGS_KEY
from bids_varaug.derivatives.sidecars import TOOL
from bids_varaug.errors import EnsembleError, ScanError
from bids_varaug.files import write_json
from bids_varaug.images.conform import Box, conform, extract
from bids_varaug.images.intensity import normalise_intensity
from bids_varaug.images.load import Volume, load_t1w, read_t1w
from bids_varaug.models.encoders import (
    SHAPE,
    VOXEL_SIZE,
    Encoder,
    EncoderEnsemble,
    build_encoder,
    load_encoder,
)
from bids_varaug.models.ensemble import BASELINE, sha256_of

KIND = "images"
RAW = "bids:raw:"
UNTRAINED = "untrained"
"""Row of the tables beside those of the members, and control: the same architecture with random weights."""


def gather_images(
    bids_dir: Path, output_dir: Path, volumes: Cohort, encoders: EncoderEnsemble, *, device: str = "cpu",
    features: Sequence[str] | None = None, progress: Callable[[Iterable], Iterable] = iter,
) -> tuple[Cohort, Cohort]:  # fmt: skip
    """Make features of the images of a cohort of volumes (`gather_cohort`), or read those made before.

    Returns the cohort of the features ``f001``, ... (the members are those of `encoders`), and the volumes of the same
    observations. The former has the controls "volumes" (divided by the brain's) and "untrained". An image without
    source or mask, or that cannot be read, is left out with the reason. One image is in memory at a time.

    `features` are as of `assemble`; `progress` wraps the observations, such as ``tqdm``. The `source` of the cohort
    (JSON types) has "kind" ("images"), "encoder", "architecture", "objective" (of the pre-training), "bids_varaug" (its
    version), "sloppy" (of the segmentation), "sha256" by member; and what `assemble` adds. Raises `EnsembleError` for
    weights that cannot be used or members that were not compared, and as `assemble` and `replacing`.
    """
    if not encoders.is_aligned:
        raise EnsembleError(
            f"{encoders.directory}: the features of its members were not brought to those of {BASELINE}. Run "
            f"bids_varaug-pretrain again on this folder, with {BASELINE} among --members and without --member-index."
        )
    encode, rows, left_out = _Encode(encoders, device), {}, dict(volumes.left_out)
    for row, who in progress(list(enumerate(volumes.people.itertuples(index=False)))):
        folder = output_dir.joinpath(*[part for part in (who.participant_id, who.session_id) if part], "anat")
        try:
            rows[row] = _features(bids_dir, folder, str(who.observation), encode)
        except ScanError as error:
            left_out[str(who.observation)] = str(error)
    volumes = volumes.take(np.array(list(rows), np.int64))
    shape = (len(rows), len(encoders.members) + 1, encoders.n_features)
    values = np.array(list(rows.values()), np.float64).reshape(shape)
    members = tuple(member.id for member in encoders.members)
    labels = tuple(f"f{n:03d}" for n in range(1, encoders.n_features + 1))
    present = np.ones((len(rows), len(members)), bool)
    source = {
        "kind": KIND, "encoder": encoders.name, "architecture": encoders.architecture, "objective": encoders.objective,
        "bids_varaug": __version__, "sloppy": bool(volumes.source.get("sloppy")), "sha256": encoders.digests,
    }  # fmt: skip
    found = Gathered(volumes.people, values[:, :-1], present, members, labels, left_out, {})
    cohort = assemble(found, source, "", features=features, require_age=False)
    kept = volumes.people["observation"].isin(cohort.people["observation"]).to_numpy()
    volumes = volumes.take(kept)
    controls = {"volumes": relative_volumes(volumes).baseline, UNTRAINED: values[kept, -1]}
    return replace(cohort, controls=controls), volumes


def check_encoder(trained_on: Mapping[str, Any], encoders: EncoderEnsemble) -> None:
    """Refuse another encoder than that of a model with this `source`, by the SHA-256 of the members that both have."""
    theirs, ours = trained_on.get("sha256") or {}, encoders.digests
    shared = theirs.keys() & ours.keys()
    if not shared or any(theirs[member] != ours[member] for member in shared):
        raise ModelError(
            f"{encoders.directory}: not the encoder that the model was fitted with, which is "
            f"{trained_on.get('encoder')} ({trained_on.get('architecture')}): the SHA-256 of its members differ. Give "
            "that folder with --encoder, or fit a model with this encoder."
        )


def load_brain(t1w: Path, mask: Path, trust: str | None = None) -> torch.Tensor:
    """Brain of a T1w image as encoders see it, `SHAPE` voxels, float32 in [0, 1.5].

    Axes are RAS+, voxels are of `VOXEL_SIZE` mm; 0 outside the mask, which has the T1w's grid. The middle is that of
    the mask's bounding box without 1 % of its voxels at each end: a mask may reach down the spinal cord. `trust` is as
    in `load_t1w`. Raises `ScanError` as that does, and for a mask of another grid.
    """
    native, stored = load_t1w(t1w, trust), read_t1w(mask, trust)
    if stored.data.shape != native.data.shape:
        grids = " and ".join(" x ".join(map(str, data.shape)) for data in (stored.data, native.data))
        raise ScanError(f"{mask.name}: not of the grid of {t1w.name} ({grids} voxels). Segment the image again.")
    brain = conform(Volume(stored.data.astype(np.float32), native.affine), VOXEL_SIZE).data > 0.5
    if not brain.any():
        raise ScanError(f"{mask.name}: holds no brain. Segment the image again.")
    image = np.where(brain, conform(native, VOXEL_SIZE).data, np.float32(0))
    start = []
    for axis, side in enumerate(SHAPE):
        voxels = np.cumsum(brain.sum(axis=tuple({0, 1, 2} - {axis})))
        start.append((np.searchsorted(voxels, [0.01 * voxels[-1], 0.99 * voxels[-1]]).sum() + 1 - side) // 2)
    return normalise_intensity(torch.from_numpy(extract(image, Box(tuple(map(int, start)), SHAPE))))


class _Encode:
    """The members of an ensemble, then the untrained network; weights are read when the first image needs them."""

    def __init__(self, encoders: EncoderEnsemble, device: str) -> None:
        self.encoders, self.device = encoders, device

    @cached_property
    def networks(self) -> dict[str, Encoder]:
        load = partial(load_encoder, self.encoders, device=self.device)
        untrained = build_encoder(self.encoders.architecture, len(self.encoders.outputs), seed=0)
        networks = {member.id: load(member) for member in self.encoders.members}
        return networks | {UNTRAINED: untrained.to(self.device).eval()}

    def __call__(self, image: torch.Tensor) -> pd.DataFrame:
        """Return a row per network: member, then the features."""
        batch = image[None, None].to(self.device)
        with torch.inference_mode():
            rows = {name: network.features(batch)[0].cpu().numpy() for name, network in self.networks.items()}
        return pd.DataFrame(rows).T.rename(columns=lambda n: f"f{n + 1:03d}").rename_axis("member").reset_index()


def _features(bids_dir: Path, folder: Path, observation: str, encode: _Encode) -> np.ndarray:
    """Features of an image, a row per network; of the table beside it where that is of this encoder and mask."""
    mask, table = folder / names.OUTPUTS["brain_mask"].name(observation), folder / f"{observation}_{names.FEATURES}"
    source, trust = _origin(folder, observation)
    if not mask.is_file():
        raise ScanError(f"{mask.name}: no such file ({folder}). Run the participant level for this image again.")
    encoders = encode.encoders
    content = {
        "Description": f"Features of the brain by each member of an encoder; {UNTRAINED}: the same architecture with "
        "random weights",
        "Sources": [f"{RAW}{source}"],
        "GeneratedBy": [{"Name": TOOL, "Version": __version__}],
        "Encoder": {"Name": encoders.name, "Architecture": encoders.architecture, "SHA256": encoders.digests},
        "BrainMaskSHA256": sha256_of(mask),
    }
    if not _is_current(table, content):
        write_table(encode(load_brain(bids_dir / source, mask, trust)), table, float_format="%.9g")
        write_json(content | {"TableSHA256": sha256_of(table)}, table.with_suffix(".json"))
    return pd.read_csv(table, sep="\t", index_col="member").to_numpy(np.float64)


def _origin(folder: Path, observation: str) -> tuple[str, str | None]:
    """Path of the T1w image in its dataset, and --trust of the participant level, by the sidecar of the volumes."""
    try:
        path, *_ = folder.glob(f"{observation}{ENDING.removesuffix('.tsv')}.json")
        sidecar = json.loads(path.read_bytes())
        source, *_ = (source for source in sidecar["Sources"] if source.startswith(RAW))
        return source.removeprefix(RAW), sidecar.get(SETTINGS_KEY, {}).get("trust")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ScanError(
            f"{observation}: no sidecar of {ENDING} names its T1w image ({RAW}...). Segment the image again."
        ) from error


def _is_current(table: Path, content: Mapping[str, Any]) -> bool:
    """Whether a table is whole, and its sidecar says the same as `content`."""
    try:
        return json.loads(table.with_suffix(".json").read_bytes()) == {**content, "TableSHA256": sha256_of(table)}
    except (OSError, ValueError):
        return False
