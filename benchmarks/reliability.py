"""Does the ensemble's spread say where it is wrong? On images with labels, by the app's outputs.

    python benchmarks/reliability.py IMAGES_DIR ... --output DIR [--ensemble aseg31]
        [--members mca seed] [--undo-temperature] [--plot reliability.png]

Segments the ``*_T1w.nii.gz`` of each IMAGES_DIR (what is done is not done again), compares with the
``*_dseg.nii.gz`` beside each (FreeSurfer's choroid plexus counts as lateral ventricle, its corpus
callosum and hypointensities, which have no side, do not count), and prints for each image and for
all together, over the voxels that the consensus or the labels call brain:

calibration error
    mean |confidence - accuracy| over 15 bins of the mean posterior's largest class, weighted by
    their voxels (Naeini et al. 2015), in percent;
entropy and error
    area under the ROC curve of the vote entropy as a sign that the consensus is wrong (0.5 is
    chance), and Spearman's rank correlation of the two;
errors inside, outside
    share of wrong voxels in the unreliable mask and outside of it, and the share of all errors
    that lie inside;
CV and volume error
    Spearman's rank correlation, over structures, of the volume's coefficient of variation with the
    relative volume error.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from aseg import harmonise
from families import load, make_dataset
from scipy import stats

from bids_varaug.models.ensemble import load_ensemble
from bids_varaug.training.monitor import find_labelled_images

N_BINS = 15


def segment(t1w: list[Path], output: Path, ensemble: str, members: list[str]) -> dict[str, Path]:
    """Run the app on images without results; return the folder of results of each image's name."""
    dataset = make_dataset(t1w, output / "bids")
    results = output / "derivatives"
    done = {path.parent.parent.name for path in results.glob("sub-*/anat/*consensus_dseg.tsv")}
    todo = sorted(p.name.removeprefix("sub-") for p in dataset.glob("sub-*") if p.name not in done)
    if todo:
        command = [
            "bids_varaug", str(dataset), str(results), "participant", "--participant-label", *todo,
            "--members", ",".join(["ieee", *members]), "--ensemble", ensemble,
            "--skip-bids-validation", "-w", str(output / "work"), "--clean-workdir",
        ]  # fmt: skip
        subprocess.run([Path(sys.executable).with_name(command[0]), *command[1:]], check=True)
    links = {link.resolve(): link for link in dataset.glob("sub-*/anat/*_T1w.nii.gz")}
    return {path.name: results / links[path.resolve()].parts[-3] / "anat" for path in t1w}


def voxels_of(
    anat: Path, labels: Path, ids: list[int], undo_temperature: bool = False
) -> dict[str, np.ndarray]:
    """Confidence, correctness, entropy and unreliability of each brain voxel of an image."""
    consensus = load(anat, "desc-consensus_dseg").astype(int)
    truth = harmonise(np.asarray(nib.load(labels).dataobj).astype(int))
    judged = truth >= 0
    truth[~np.isin(truth, ids)] = 0
    brain = ((consensus > 0) | (truth > 0)) & judged
    posterior = load(anat, "desc-mean_probseg")
    sidecar = json.loads(next(anat.glob("*desc-mean_probseg.json")).read_text())
    assert len(sidecar["LabelMap"]) == posterior.shape[-1]
    posterior = posterior[brain].astype(float)
    if undo_temperature:
        posterior **= sidecar["Temperature"]
        posterior /= posterior.sum(-1, keepdims=True)
    return {
        "confidence": posterior.max(-1),
        "right": (consensus == truth)[brain],
        "entropy": load(anat, "stat-entropy_statmap")[brain].astype(float),
        "unreliable": load(anat, "label-unreliable_mask")[brain] > 0,
    }


def volume_rows(anat: Path, labels: Path) -> pd.DataFrame:
    """Coefficient of variation and relative volume error of each structure of an image."""
    table = pd.read_csv(next(anat.glob("*desc-consensus_dseg.tsv")), sep="\t", na_values="n/a")
    image = nib.load(labels)
    ids = harmonise(np.asarray(image.dataobj).astype(int))
    voxel = abs(np.linalg.det(image.affine[:3, :3]))
    true = table["index"].map(lambda index: (ids == index).sum() * voxel)
    table["error"] = (table["volume_mean"] - true).abs() / true
    return table[true > 0][["name", "cv", "error"]]


def reliability_bins(confidence: np.ndarray, right: np.ndarray) -> pd.DataFrame:
    """Voxels, mean confidence and accuracy in each bin of confidence."""
    which = np.minimum((confidence * N_BINS).astype(int), N_BINS - 1)
    frame = pd.DataFrame({"bin": which, "confidence": confidence, "accuracy": right.astype(float)})
    return frame.groupby("bin").agg(
        voxels=("accuracy", "size"),
        confidence=("confidence", "mean"),
        accuracy=("accuracy", "mean"),
    )


def measures(v: dict[str, np.ndarray], volumes: pd.DataFrame) -> dict[str, float]:
    """Return the numbers that the module's docstring explains."""
    bins = reliability_bins(v["confidence"], v["right"])
    gaps = (bins["confidence"] - bins["accuracy"]).abs()
    wrong, inside = ~v["right"], v["unreliable"]
    ranks = stats.rankdata(v["entropy"])
    n_wrong, n_right = wrong.sum(), v["right"].sum()
    area = (ranks[wrong].sum() - n_wrong * (n_wrong + 1) / 2) / (n_wrong * n_right)
    return {
        "error_percent": 100 * wrong.mean(),
        "confidence_percent": 100 * v["confidence"].mean(),
        "calibration_error_percent": 100 * (gaps * bins["voxels"]).sum() / bins["voxels"].sum(),
        "entropy_auc": area,
        "entropy_spearman": stats.spearmanr(v["entropy"], wrong).statistic,
        "inside_percent": 100 * wrong[inside].mean() if inside.any() else np.nan,
        "outside_percent": 100 * wrong[~inside].mean(),
        "errors_inside_percent": 100 * inside[wrong].mean(),
        "cv_spearman": stats.spearmanr(volumes["cv"], volumes["error"]).statistic,
    }


def plot(groups: dict[str, pd.DataFrame], path: Path) -> None:
    """Draw accuracy against confidence."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    axes.plot([0, 1], [0, 1], color="0.7", lw=1)
    for name, bins in groups.items():
        axes.plot(bins["confidence"], bins["accuracy"], "o-", ms=4, label=name)
    axes.set(xlabel="mean posterior of the consensus label", ylabel="share of voxels right",
             xlim=(0, 1), ylim=(0, 1), aspect="equal")  # fmt: skip
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Parse the command line, segment, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ensemble", default="aseg31")
    parser.add_argument("--members", nargs="+", default=["mca", "seed"])
    parser.add_argument("--undo-temperature", action="store_true", help="before calibration")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    labels = load_ensemble(options.ensemble).labels
    names, ids = {label.index: label.name for label in labels}, [label.index for label in labels]
    found = {d: find_labelled_images(d, names) for d in options.images}
    t1w = [image.t1w for images in found.values() for image in images]
    folders = segment(t1w, options.output, options.ensemble, options.members)
    rows, groups = {}, {}
    for directory, images in found.items():
        parts = []
        for image in images:
            anat = folders[image.t1w.name]
            voxels = voxels_of(anat, image.labels, ids, options.undo_temperature)
            parts.append((voxels, volume_rows(anat, image.labels)))
            rows[image.t1w.name.split("_T1w")[0]] = measures(*parts[-1])
        pooled = {key: np.concatenate([v[key] for v, _ in parts]) for key in parts[0][0]}
        rows[f"all of {directory.name}"] = measures(pooled, pd.concat([t for _, t in parts]))
        groups[directory.name] = reliability_bins(pooled["confidence"], pooled["right"])
    print(pd.DataFrame(rows).T.rename_axis("image").to_csv(sep="\t", float_format="%.3f"), end="")
    if options.plot:
        plot(groups, options.plot)


if __name__ == "__main__":
    main()
