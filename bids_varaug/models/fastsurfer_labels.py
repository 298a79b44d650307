"""The classes of FastSurferVINN: what each network tells apart, and what a segmentation has.

The coronal and the axial network have 79 classes. The two sides share the classes of those parcels of the cortex that
lie far from the midline; post-processing tells them apart, which makes 96 (`IDS`). The sagittal network has 51: it
cannot see on which side it is.
"""

from __future__ import annotations

import csv
from importlib.resources import files

from bids_varaug.models.ensemble import Label

RIGHT = 1000
"""What an id of the right cortex is larger than that of the left one."""
RIGHT_PARCELS = (2002, 2005, 2010, 2012, 2013, 2014, 2016, 2017, 2021, 2022, 2023, 2024, 2025, 2028)
"""Parcels of the right cortex with a class of their own."""
LEFT_TO_RIGHT = {
    2: 41, 4: 43, 5: 44, 7: 46, 8: 47, 10: 49, 11: 50, 12: 51, 13: 52, 17: 53, 18: 54, 26: 58, 28: 60, 31: 63,
}  # fmt: skip
"""Structures that the sagittal network knows by the id of the right one."""


def read_labels() -> tuple[Label, ...]:
    """Labels of a segmentation, in the order of their ids, background first."""
    with (files("bids_varaug") / "data" / "fastsurfer.tsv").open(encoding="utf-8") as stream:
        rows = csv.DictReader(stream, delimiter="\t")
        return tuple(Label(int(row["index"]), row["name"], row["color"]) for row in rows)


IDS = tuple(label.index for label in read_labels())
"""Ids of a segmentation, in order."""
NETWORK_IDS = tuple(i for i in IDS if i < 2 * RIGHT or i in RIGHT_PARCELS)
"""Id of each class of the coronal and the axial network."""
SAGITTAL_IDS = tuple(i for i in NETWORK_IDS if i not in LEFT_TO_RIGHT and i < 2 * RIGHT)
"""Id of each class of the sagittal network."""


def _sagittal_id(index: int) -> int:
    return index - RIGHT if index > 2 * RIGHT else LEFT_TO_RIGHT.get(index, index)


SAGITTAL_CHANNELS = tuple(SAGITTAL_IDS.index(_sagittal_id(i)) for i in NETWORK_IDS)
"""Class of the sagittal network that stands for each of `NETWORK_IDS`."""
