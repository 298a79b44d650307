"""FreeSurfer's aseg in the terms of the ensemble's labels, of which there are fewer."""

from __future__ import annotations

import numpy as np

MERGED = {31: 4, 63: 43}  # choroid plexus: part of the lateral ventricles in our training data
NOT_JUDGED = (77, 80, 251, 252, 253, 254, 255)  # hypointensities, corpus callosum: have no side


def harmonise(reference: np.ndarray) -> np.ndarray:
    """Return FreeSurfer ids (int) as ids of ours, -1 where none of ours corresponds."""
    ours = reference.copy()
    for theirs, merged in MERGED.items():
        ours[reference == theirs] = merged
    ours[np.isin(reference, NOT_JUDGED)] = -1
    return ours
