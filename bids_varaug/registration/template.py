"""The template: its label map, which this package ships, and its T1w image, which TemplateFlow has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage
from platformdirs import user_cache_dir

from bids_varaug.errors import NoInputError, UsageError
from bids_varaug.registration.space import GRIDS, SPACE, Grid


@dataclass(frozen=True)
class Template:
    """What heads are registered to, on ``GRIDS[2]``."""

    labels: np.ndarray  # (X, Y, Z) uint8, classes of an ensemble
    grid: Grid


def load_template(label_ids: Sequence[int]) -> Template:
    """Read the label map as classes of an ensemble, whose label ids are `label_ids`, background first.

    Structures that either of the two lacks are background. UsageError if they share fewer than four.
    """
    with as_file(files("bids_varaug") / "data" / f"tpl-{SPACE}_res-02_desc-aseg31_dseg.nii.gz") as path:
        image = cast(SpatialImage, nib.load(path))
        ids = np.asarray(image.dataobj).astype(np.uint8)
    classes = np.zeros(256, np.uint8)
    for k, index in enumerate(label_ids):
        if 0 < index < 256:
            classes[index] = k
    if len(np.intersect1d(ids, label_ids)) < 5:  # with the background
        raise UsageError(
            f"--output-spaces {SPACE}: the ensemble's labels have fewer than four of the template's "
            f"{len(np.unique(ids)) - 1} structures (FreeSurfer ids). Use an ensemble with these, or leave "
            "--output-spaces out."
        )
    return Template(classes[ids], GRIDS[2])


def find_template_t1w(allow_downloads: bool) -> Path:
    """Find the brain-extracted T1w image of the template with TemplateFlow's own client.

    Nothing is downloaded, and no folder made, unless `allow_downloads`; NoInputError if it is not there or cannot be
    fetched, with how to fetch it beforehand.
    """
    query: dict[str, Any] = {"resolution": 1, "desc": "brain", "suffix": "T1w", "extension": ".nii.gz"}
    fetch = f"python -c \"from templateflow import api; api.get('{SPACE}', resolution=1, desc='brain', suffix='T1w')\""
    advice = (
        f"Fetch it once where there is a network: {fetch}; then pass its folder as TEMPLATEFLOW_HOME (mount it into a "
        "container). Or allow the download: --allow-downloads."
    )
    # The client would fill an empty home with empty files as soon as it is imported.
    home = Path(os.environ.get("TEMPLATEFLOW_HOME") or user_cache_dir("templateflow"))
    if not allow_downloads and not any(home.glob(f"tpl-{SPACE}/*")):
        raise NoInputError(f"{home}: the template {SPACE} is not there. {advice}")
    try:
        from templateflow import TemplateFlowClient

        client = TemplateFlowClient(autoupdate=False)
        found = client.ls(SPACE, **query)
        if allow_downloads and found:
            found = [client.get(SPACE, **query)]
        present = [path for path in found if path.is_file() and path.stat().st_size > 0]
    except Exception as error:  # its own, requests', the disk's
        raise NoInputError(
            f"TemplateFlow: the template {SPACE} cannot be read or fetched ({error}). {advice}"
        ) from error
    if not present:
        raise NoInputError(f"{client.cache.config.root}: the T1w image of {SPACE} is not there. {advice}")
    return present[0]
