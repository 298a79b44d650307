"""A head of boxes: enough structure to draw from and to learn."""

import numpy as np
import pytest
import torch

from bids_varaug.training.labels import TrainingSubject, load_scheme


@pytest.fixture(scope="session")
def scheme():
    return load_scheme()


@pytest.fixture(scope="session")
def subject(scheme):
    """(64, 72, 64): skin, bone, CSF, cortex and white matter of both sides, ventricles."""
    labels = np.zeros((64, 72, 64), np.int32)
    for id_left, id_right, margin in ((511, 511, 4), (515, 515, 8), (24, 24, 11), (3, 42, 13),
                                      (2, 41, 19), (4, 43, 27)):  # fmt: skip
        box = (slice(margin, -margin),) * 3
        labels[box] = id_right
        labels[:32][(slice(margin, None), *box[1:])] = id_left
    return TrainingSubject(torch.from_numpy(np.searchsorted(scheme.ids, labels).astype(np.uint8)))
