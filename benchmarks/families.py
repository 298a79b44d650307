"""Spread of the families rr, mca and seed on real heads, beside published numbers.

    python benchmarks/families.py T1W.nii.gz ... --output DIR [--n-members 4]
        [--families rr mca seed] [--grids 1] [--published summary.tsv] [--plot families.png]

Runs the participant level once for each family, on the same heads and with as many members:
``--members ieee --perturb-inference N``, ``--members mca --n-members N``, ``--members seed
--n-members N``. Then prints, for each family, means over heads of

minimum Dice
    the smallest Dice overlap over all pairs of members, mean over structures (`dice_min`);
significant bits, volumes
    of the structures' volumes, mean over structures (`sigbits`);
significant bits, posterior
    of the consensus label's posterior, mean over the voxels of the brain mask;
unreliable voxels
    share of the brain mask in which fewer than three in four members chose the consensus label.

An image that was done is not done again: a run that was stopped goes on where it was.
``--published`` is a table of mean minimum Dice by source and ensemble (columns source, ensemble,
n_subjects, n_rois, mean_min_dice); the plot shows both.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

FAMILIES = {
    "rr": ("inference under random rounding", ["--members", "ieee", "--perturb-inference"]),
    "mca": ("trained under Monte Carlo arithmetic", ["--members", "mca", "--n-members"]),
    "seed": ("trained with other seeds", ["--members", "seed", "--n-members"]),
}
MEASURES = ["dice_min", "bits_of_volumes", "bits_of_posterior", "unreliable"]


def make_dataset(heads: list[Path], folder: Path) -> Path:
    """Make a BIDS dataset of links to the heads, each a subject named like its file."""
    (folder / "dataset_description.json").parent.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_description.json").write_text('{"Name": "Heads", "BIDSVersion": "1.10.0"}')
    (folder / "README").write_text("Links to single heads.\n")
    for head in heads:
        stem = head.name.removesuffix(".nii.gz").removesuffix("_T1w").removeprefix("sub-")
        label = "".join(c for c in stem if c.isalnum())
        link = folder / f"sub-{label}" / "anat" / f"sub-{label}_T1w.nii.gz"
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(head.resolve())
    return folder


def run_family(family: str, dataset: Path, output: Path, options: argparse.Namespace) -> None:
    """Run the participant level on those heads that have no result."""
    done = {path.parent.parent.name for path in output.glob("sub-*/anat/*consensus_dseg.tsv")}
    todo = sorted(p.name.removeprefix("sub-") for p in dataset.glob("sub-*") if p.name not in done)
    if todo:
        command = [
            "bids_varaug", str(dataset), str(output), "participant", "--participant-label", *todo,
            *FAMILIES[family][1], str(options.n_members), "--ensemble", options.ensemble,
            "--grids", options.grids, "--skip-bids-validation", "--clean-workdir",
            "-w", str(output.with_name(output.name + "_work")),
        ]  # fmt: skip
        subprocess.run([Path(sys.executable).with_name(command[0]), *command[1:]], check=True)


def measures(anat: Path) -> dict[str, float]:
    """Means over one head."""
    table = pd.read_csv(next(anat.glob("*desc-consensus_dseg.tsv")), sep="\t", na_values="n/a")
    brain = load(anat, "desc-brain_mask") > 0
    return {
        "dice_min": table["dice_min"].mean(),
        "bits_of_volumes": table["sigbits"].mean(),
        "bits_of_posterior": load(anat, "stat-sigbits_statmap")[brain].mean(),
        "unreliable": (load(anat, "label-unreliable_mask")[brain] > 0).mean(),
    }


def load(anat: Path, what: str) -> np.ndarray:
    """Voxels of one of a head's maps."""
    return np.asarray(nib.load(next(anat.glob(f"*{what}.nii.gz"))).dataobj)


def plot(table: pd.DataFrame, published: pd.DataFrame | None, path: Path) -> None:
    """Draw mean minimum Dice of each head and family, published means below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    families = list(table["family"].unique())
    labels = [f"{family}: {FAMILIES[family][0]}" for family in families]
    n_published = 0 if published is None else len(published)
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.32 * (len(labels) + n_published)))
    for y, family in enumerate(families):
        values = table.loc[table["family"] == family, "dice_min"]
        axes.plot(values, [y] * len(values), "o", mfc="none", color="C0", label="a head" * (y == 0))
        axes.plot(values.mean(), y, "D", color="C0", label="mean of heads" * (y == 0))
    for k, row in enumerate(() if published is None else published.itertuples()):
        y = len(families) + k
        axes.plot(row.mean_min_dice, y, "s", color="C1", label="published" * (k == 0))
        labels.append(f"{row.ensemble}\n({row.source.removesuffix(' repository')})")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("mean minimum Dice (fewer structures and members here than published)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    """Run, then print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("heads", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--n-members", type=int, default=4)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--ensemble", default="aseg31")
    parser.add_argument("--grids", default="auto", help="of the app")
    parser.add_argument("--published", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    dataset = make_dataset(options.heads, options.output / "bids")
    rows = []
    for family in options.families:
        output = options.output / family
        run_family(family, dataset, output, options)
        rows += [
            {"family": family, "head": anat.parent.name, **measures(anat)}
            for anat in sorted(output.glob("sub-*/anat"))
        ]
    table = pd.DataFrame(rows)
    table.to_csv(options.output / "families.tsv", sep="\t", index=False)
    names = ["minimum Dice", "significant bits, volumes", "significant bits, posterior",
             "unreliable voxels"]  # fmt: skip
    print("| family | heads | members | " + " | ".join(f"{n} (range)" for n in names) + " |")
    print("|---" * (3 + len(names)) + "|")
    for family, part in table.groupby("family", sort=False):
        cells = [
            f"{part[m].mean():.4g} ({part[m].min():.4g} to {part[m].max():.4g})" for m in MEASURES
        ]
        print(f"| {family} | {len(part)} | {options.n_members} | " + " | ".join(cells) + " |")
    published = None if options.published is None else pd.read_csv(options.published, sep="\t")
    if published is not None:
        print("\n| published | ensemble | subjects | regions | mean minimum Dice |")
        print("|---|---|---|---|---|")
        for row in published.itertuples():
            print(
                f"| {row.source} | {row.ensemble} | {row.n_subjects} | {row.n_rois} "
                f"| {row.mean_min_dice} |"
            )
    if options.plot:
        plot(table, published, options.plot)


if __name__ == "__main__":
    main()
