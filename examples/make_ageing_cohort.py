"""Simulate a BIDS dataset of ageing heads with known age, from one label map.

    python examples/make_ageing_cohort.py LABELS.nii.gz cohort --n 24 --ages 20 80 --seed 0

LABELS is a segmentation with FreeSurfer's ids, for instance what bids_varaug wrote for the MNI152
template (`make demo`): the images are then those of extracted brains. A map with a skull
(SynthSeg's training maps) gives whole heads. How the people differ, and where the numbers come
from: examples/simulation/charts.py. True volumes are in ``sourcedata/truth.tsv``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from bids_varaug.errors import OutputError, UsageError, UserError
from bids_varaug.training.labels import load_scheme
from simulation.ageing import AGE_RANGE, TEMPLATE_AGE, Head, simulate_person
from simulation.scanner import draw_scanner
from simulation.template import read_template

README = """\
# Simulated ageing heads

{n} people who do not exist, made by bids_varaug's examples/make_ageing_cohort.py from one label map
({labels}; template age {template_age:g} years, seed {seed}, {spacing:g} mm). Each head has the
template's anatomy, deformed to volumes drawn from charts of ageing: good for testing software, and
no evidence about anybody's brain. `sourcedata/truth.tsv` holds the true volumes in mm3, the head's
size relative to the template's, and by how many years each brain is older than its owner.
"""
COLUMNS = {
    "age": {"Description": "Age of the simulated person", "Units": "year"},
    "sex": {"Description": "Sex of the simulated person", "Levels": {"F": "female", "M": "male"}},
    "site": {"Description": "Simulated scanner: noise, bias field, sharpness, contrast, scale"},
}


def make_ageing_cohort(
    labels: Path,
    bids_dir: Path,
    *,
    n: int = 24,
    ages: tuple[float, float] = (20.0, 80.0),
    seed: int = 0,
    spacing: float = 1.0,
    template_age: float = TEMPLATE_AGE,
    n_sites: int = 2,
    n_rescans: int = 0,
    write_labels: bool = False,
) -> pd.DataFrame:
    """Write the dataset (the same arguments give the same bytes); returns the truth.

    Parameters
    ----------
    labels : the template's label map
    bids_dir : folder to make; must be absent or empty
    n : people
    ages : youngest and oldest, years; ages are spread evenly between
    seed : names the cohort
    spacing : voxel size, mm
    template_age : age of the template's owner, years
    n_sites : scanners, among which people are dealt out at random
    n_rescans : people with a second session, the same head scanned again
    write_labels : true label maps in ``sourcedata``, too

    Returns
    -------
    DataFrame, one row per person: participant_id, age, sex, site, brain_age_gap, head_size, then
    one column per structure, mm3
    """
    if not AGE_RANGE[0] <= ages[0] <= ages[1] <= AGE_RANGE[1]:
        raise UsageError(f"--ages {ages[0]:g} {ages[1]:g}: give two ages within {AGE_RANGE}.")
    if not AGE_RANGE[0] <= template_age <= AGE_RANGE[1]:
        raise UsageError(f"--template-age {template_age:g}: give an age within {AGE_RANGE}.")
    if not 0.5 <= spacing <= 4:
        raise UsageError(f"--size {spacing:g}: voxels must have 0.5 to 4 mm.")
    if n < 1 or n_sites < 1 or not 0 <= n_rescans <= n:
        raise UsageError("--n and --sites must be at least 1, --rescans between 0 and --n.")
    if bids_dir.exists() and (not bids_dir.is_dir() or any(bids_dir.iterdir())):
        raise OutputError(f"{bids_dir}: exists and is not empty; name a new folder.")
    template = read_template(labels, spacing)
    # Streams of their own for the plan, for each scanner and for each person.
    for_plan, for_sites, for_people = np.random.SeedSequence(seed).spawn(3)
    scanners = [draw_scanner(np.random.default_rng(s)) for s in for_sites.spawn(n_sites)]
    plan = np.random.default_rng(for_plan)
    edges = np.linspace(*ages, n + 1)
    drawn = plan.permutation(edges[:-1] + plan.random(n) * np.diff(edges)).round(1).clip(*ages)
    sexes = plan.permutation(np.resize(["F", "M"], n))
    site_of = plan.permutation(np.resize(np.arange(n_sites), n))

    people = for_people.spawn(n)
    names = _structure_names()
    width = max(2, len(str(n)))
    rows = []
    for number, (age, sex, site) in enumerate(zip(drawn, sexes, site_of, strict=True)):
        subject = f"sub-{number + 1:0{width}d}"
        head = simulate_person(
            template.labels, template.affine, float(age), str(sex),
            np.random.default_rng(people[number]), template_age=template_age,
            scanner=scanners[site], n_scans=2 if number < n_rescans else 1,
        )  # fmt: skip
        _write_head(bids_dir, subject, head, spacing, f"site{site + 1}", write_labels)
        rows.append({
            "participant_id": subject, "age": age, "sex": sex, "site": f"site{site + 1}",
            "brain_age_gap": round(head.person.brain_age_gap, 3),
            "head_size": round(head.person.head_size, 4),
            **{names[i]: round(v, 1) for i, v in head.volumes.items()},
        })  # fmt: skip
        print(f"{subject}: {age:g} years, {sex} ({number + 1} of {n})", file=sys.stderr)
    truth = pd.DataFrame(rows)
    readme = README.format(
        n=n, labels=labels.name, template_age=template_age, seed=seed, spacing=spacing
    )
    _write_dataset_files(bids_dir, truth, readme)
    return truth


def _structure_names() -> dict[int, str]:
    scheme = load_scheme()
    return dict(zip(scheme.target_ids, scheme.target_names, strict=True))


def _write_head(
    bids_dir: Path, subject: str, head: Head, spacing: float, site: str, write_labels: bool
) -> None:
    sidecar = {
        "Modality": "MR",
        "Manufacturer": "none, simulated",
        "StationName": site,
        "Description": "Simulated T1w image of a simulated head",
    }
    several = len(head.images) > 1
    for number, (image, labels) in enumerate(zip(head.images, head.labels, strict=True), 1):
        session = f"ses-{number}" if several else ""
        prefix = "_".join(filter(None, (subject, session)))
        place = Path(*filter(None, (subject, session, "anat")))
        values = np.clip(np.rint(image), 0, np.iinfo(np.int16).max).astype(np.int16)
        _write_nifti(bids_dir / place / f"{prefix}_T1w.nii.gz", values, head.affine)
        text = json.dumps(sidecar, indent=2) + "\n"
        (bids_dir / place / f"{prefix}_T1w.json").write_text(text, encoding="utf-8")
        if write_labels:
            path = bids_dir / "sourcedata" / place / f"{prefix}_dseg.nii.gz"
            _write_nifti(path, labels, head.affine)


def _write_nifti(path: Path, values: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(values, affine)
    image.set_sform(affine, 1)  # 1: scanner coordinates
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm", "sec")
    # No time stamp: the same seed gives the same bytes.
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=3, mtime=0))


def _write_dataset_files(bids_dir: Path, truth: pd.DataFrame, readme: str) -> None:
    description = {
        "Name": "Simulated ageing heads",
        "BIDSVersion": "1.10.0",
        "DatasetType": "raw",
        "Authors": ["bids_varaug, examples/make_ageing_cohort.py"],
    }
    for name, content in (("dataset_description", description), ("participants", COLUMNS)):
        text = json.dumps(content, indent=2) + "\n"
        (bids_dir / f"{name}.json").write_text(text, encoding="utf-8")
    (bids_dir / "README.md").write_text(readme, encoding="utf-8")
    people = truth[["participant_id", *COLUMNS]]
    people.to_csv(bids_dir / "participants.tsv", sep="\t", index=False, lineterminator="\n")
    (bids_dir / "sourcedata").mkdir(exist_ok=True)
    path = bids_dir / "sourcedata" / "truth.tsv"
    truth.to_csv(path, sep="\t", index=False, lineterminator="\n")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels", type=Path, help="label map of the template, FreeSurfer ids")
    parser.add_argument("bids_dir", type=Path, help="where to write the dataset")
    parser.add_argument("--n", type=int, default=24, help="people (default: 24)")
    parser.add_argument("--ages", type=float, nargs=2, default=(20.0, 80.0),
                        metavar=("MIN", "MAX"), help="years (default: 20 80)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="names the cohort (default: 0)")
    parser.add_argument("--size", type=float, default=1.0, help="voxel size, mm (default: 1)")
    parser.add_argument("--template-age", type=float, default=TEMPLATE_AGE,
                        help="of the label map's owner, years (default: 25)")  # fmt: skip
    parser.add_argument("--sites", type=int, default=2, help="scanners (default: 2)")
    parser.add_argument("--rescans", type=int, default=0,
                        help="people with a second session (default: 0)")  # fmt: skip
    parser.add_argument("--write-labels", action="store_true",
                        help="write the true label maps to sourcedata")  # fmt: skip
    given = parser.parse_args(arguments)
    try:
        make_ageing_cohort(
            given.labels, given.bids_dir, n=given.n, ages=tuple(given.ages), seed=given.seed,
            spacing=given.size, template_age=given.template_age, n_sites=given.sites,
            n_rescans=given.rescans, write_labels=given.write_labels,
        )  # fmt: skip
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return int(error.exit_code)
    print(given.bids_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
