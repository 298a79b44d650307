"""Volumes of segmented heads, and of label maps, among those of adults.

    python benchmarks/adults.py ADULTS.tsv --derivatives DIR [--participants LABEL ...]
    python benchmarks/adults.py ADULTS.tsv --label-maps DIR

ADULTS.tsv holds FreeSurfer's volumes (mm3) and ages of people without disease, for example
fcon1000_freesurfer.tsv of the 1000 Functional Connectomes (Biswal et al. 2010; Rutherford et al.
2022, eLife 11:e72904); those below 18 years are left out. For each structure: the median of the
adults and ours, their ratio, and the median over our heads of the percentile among the adults.

Of a folder that bids_varaug wrote, volumes are those of the consensus table; of label maps, voxels
of 1 mm3 that the trainer gives this structure.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from bids_varaug.brainage.repeated_runs import MEASURES, RENAMED
from bids_varaug.training.labels import load_scheme
from bids_varaug.training.subjects import find_label_maps, load_label_map

ADULT_YEARS = 18


def read_derivatives(folder: Path, participants: list[str] | None) -> pd.DataFrame:
    """Volumes in mm3, a row per scan, a column per structure."""
    tables = sorted(folder.rglob("*_desc-consensus_dseg.tsv"))
    if participants:
        wanted = {f"sub-{label.removeprefix('sub-')}" for label in participants}
        tables = [path for path in tables if path.name.split("_")[0] in wanted]
    rows = {path.name: pd.read_csv(path, sep="\t").set_index("name")["volume_mean"]
            for path in tables}  # fmt: skip
    return pd.DataFrame(rows).T


def read_label_maps(folder: Path) -> pd.DataFrame:
    """The same of label maps, as the trainer reads them."""
    scheme = load_scheme()
    rows = []
    for path in find_label_maps(folder):
        targets = scheme.targets[load_label_map(path, scheme)]
        rows.append(np.bincount(targets.ravel(), minlength=len(scheme.target_ids))[1:])
    return pd.DataFrame(rows, columns=scheme.target_names[1:])


def compare(ours: pd.DataFrame, adults: pd.DataFrame) -> pd.DataFrame:
    """One row per structure that both have."""
    rows = {}
    for name in ours.columns.intersection(adults.columns):
        percentiles = [100 * (adults[name] < volume).mean() for volume in ours[name]]
        medians = adults[name].median(), ours[name].median()
        rows[name] = (*medians, medians[1] / medians[0], np.median(percentiles))
    return pd.DataFrame(rows, index=["adults", "ours", "ratio", "percentile"]).T


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adults", type=Path)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--derivatives", type=Path)
    source.add_argument("--label-maps", type=Path)
    parser.add_argument("--participants", nargs="+")
    options = parser.parse_args()
    adults = pd.read_csv(options.adults, sep="\t").rename(columns=MEASURES | RENAMED)
    adults = adults[adults["age"] >= ADULT_YEARS]
    if options.label_maps:
        ours = read_label_maps(options.label_maps)
    else:
        ours = read_derivatives(options.derivatives, options.participants)
    table = compare(ours, adults)
    print(f"{len(ours)} heads, {len(adults)} adults")
    formats = {"adults": "{:.0f}", "ours": "{:.0f}", "ratio": "{:.2f}", "percentile": "{:.0f}"}
    print(table.to_string(formatters={name: text.format for name, text in formats.items()}))


if __name__ == "__main__":
    main()
