"""Outliers and detectable changes on one man's many sessions, against the published repeatability.

    python benchmarks/simon.py simon_freesurfer.csv simon_fastserfer.csv

The tables hold volumes by pair of sessions and structure of SIMON (one man, 73 sessions over 17 years, several
scanners) as published with arXiv:2504.15931. Sessions count as repeated scans: their standard deviation is that of a
scan, with scanners and some ageing in it. Failed segmentations are found by `robust_distances` and left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from bids_varaug.variability.longitudinal import paired_changes, rescan_noise
from bids_varaug.variability.quality import OUTLYING, robust_distances


def read_sessions(path: Path) -> pd.DataFrame:
    """Volumes [mm3], sessions x structures, of a table by pairs."""
    pairs = pd.read_csv(path)
    sides = [pairs[[f"session{k}", "label_name", f"volume{k}"]].set_axis(["session", "name", "volume"], axis=1)
             for k in (1, 2)]  # fmt: skip
    return pd.concat(sides).groupby(["session", "name"])["volume"].median().unstack().dropna()


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", type=Path, nargs="+")
    for path in parser.parse_args().tables:
        volumes = read_sessions(path)
        distances, _ = robust_distances(volumes.to_numpy())
        kept = volumes[distances <= OUTLYING]
        print(f"{path.name}: {len(volumes)} sessions, {len(volumes) - len(kept)} stand out: "
              f"{', '.join(volumes.index[distances > OUTLYING])}")  # fmt: skip
        people = pd.DataFrame({"participant_id": "sub-1", "session_id": kept.index})
        as_runs = people.assign(observation=[f"sub-1_run-{n}" for n in range(len(kept))])
        sd_scan, freedom = rescan_noise(as_runs, kept.to_numpy())
        whole, _ = rescan_noise(
            pd.DataFrame({"observation": [f"sub-1_run-{n}" for n in range(len(volumes))]}), volumes.to_numpy()
        )
        np.testing.assert_allclose(sd_scan, 100 * kept.std() / kept.mean())  # the CV, as anybody would compute it
        changes = paired_changes(as_runs, list(kept), kept.to_numpy()[:, None], {"sub-1": list(kept.index)})
        beyond = changes["mark"].eq("beyond").groupby(changes["name"]).mean()
        table = pd.DataFrame(
            {"SD, all": whole, "SD of a scan": sd_scan, "detectable": 2**0.5 * 1.96 * sd_scan}, kept.columns
        )
        table = table.assign(beyond=100 * beyond)
        print(f"[%], {freedom} degrees of freedom; beyond: changes since the first session")
        print(table[~table.index.str.contains("Cortex|Gyrus|Insula")].round(1).to_string(), "\n")


if __name__ == "__main__":
    main()
