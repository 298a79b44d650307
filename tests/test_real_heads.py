"""The shipped ensemble on real heads; needs the development data, which is not in the repository.

Whole heads and brain-extracted ones, 0.87 to 3 mm: a run of the app with one member of each family, and the baseline
alone on those that are not in it.
"""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from nibabel.processing import resample_from_to
from sklearn.metrics import roc_auc_score

from bids_varaug.cli.run import main
from bids_varaug.images.conform import prepare_head
from bids_varaug.inputs.freesurfer import MEASURES, RENAMED
from bids_varaug.inputs.validation import run_validator
from bids_varaug.models.ensemble import load_ensemble
from bids_varaug.models.unet import load_member
from bids_varaug.segmentation.predict import crop_to_brain, segment_volume
from bids_varaug.training.monitor import dice_with_truth

HEADS = {
    "bert": "t1w/bert/bert_desc-norm_T1w.nii.gz",
    "mnesample": "t1w/mnesample_res-3mm_T1w.nii.gz",
    "rorden": "t1w/rorden_T1w.nii.gz",
    "rordenconform": "t1w/rorden_desc-conform_T1w.nii.gz",
}
ONE_STUDY = "bids/ds002748-subset/sub-{0}/anat/sub-{0}_T1w.nii.gz"
OTHERS = [
    "t1w/colin27_T1w.nii.gz",
    "t1w/corr-0025531_desc-brain_T1w.nii.gz",
    "bids/pumi-minitest/sub-001/anat/sub-001_T1w.nii.gz",
    ONE_STUDY.format("02"),
    ONE_STUDY.format("12"),
    ONE_STUDY.format("30"),
]
# Of the same scanner as the last three: at 2 mm, as with --sloppy, in a third of the time.
OTHERS_AT_2MM = [ONE_STUDY.format(subject) for subject in (23, 31, 43, 51, 52, 55, 57, 63, 64)]
RESAMPLED = ("rorden", "rordenconform")  # one head at 0.88 mm, and at 1 mm by another tool
TRUTH = {
    "bert": "t1w/bert/bert_desc-aseg_dseg.nii.gz",
    "mnesample": "t1w/mnesample_res-3mm_desc-aseg_dseg.nii.gz",
}
# A little below what docs/reference/model-card.md states, for one member of each family.
LEAST_DICE = {"bert": 0.84, "mnesample": 0.80}
# At 3 mm the posterior is too soft, and the mask too large.
LEAST_PRECISION = {"bert": 0.45, "mnesample": 0.35}
# Of the total entropy, as a sign of an error. The aim is 0.80; the head at 3 mm has 0.74 with the shipped ensemble.
LEAST_AUC = {"bert": 0.80, "mnesample": 0.72}
# Relative difference of volumes.
MOST_RESAMPLING = 0.05
MOST_RESAMPLING_ON_AVERAGE = 0.012
# In voxels of the T1w's grid, finer than the network's, which loses thin structures: of the inferior lateral
# ventricles, of all others, and on average.
MOST_RESAMPLING_COUNTED = 0.105, 0.07, 0.022
LEAST_RESAMPLING_DICE = 0.92


@pytest.fixture(scope="module")
def dataset(shared_data, tmp_path_factory):
    """A BIDS dataset of all heads."""
    folder = tmp_path_factory.mktemp("real")
    for subject, source in HEADS.items():
        anat = folder / "bids" / f"sub-{subject}" / "anat"
        anat.mkdir(parents=True)
        shutil.copy(shared_data / source, anat / f"sub-{subject}_T1w.nii.gz")
    description = {"Name": "Real heads", "BIDSVersion": "1.10.0", "DatasetType": "raw"}
    (folder / "bids" / "dataset_description.json").write_text(json.dumps(description))
    (folder / "bids" / "README").write_text("Copies of development data, for one test run.\n")
    return folder / "bids"


@pytest.fixture(scope="module")
def finished(dataset):
    """Output of one run over all heads."""
    output, work = dataset.parent / "out", dataset.parent / "work"
    few = ("--n-members", "1", "--nprocs", "1", "--clean-workdir")
    assert main([str(dataset), str(output), "participant", "-w", str(work), *few]) == 0
    return output


def labels_of(out: Path, subject: str) -> np.ndarray:
    path = out / f"sub-{subject}" / "anat" / f"sub-{subject}_seg-varaug_desc-consensus_dseg.nii.gz"
    return np.asarray(nib.load(path).dataobj)


def test_output_is_valid_with_a_report_each(finished):
    assert run_validator(finished) == []
    assert sorted(p.stem for p in finished.glob("*.html")) == sorted(f"sub-{s}" for s in HEADS)


@pytest.mark.parametrize("subject", sorted(TRUTH))
def test_consensus_overlaps_freesurfer(finished, shared_data, subject):
    found = labels_of(finished, subject)
    truth = np.asarray(nib.load(shared_data / TRUTH[subject]).dataobj).astype(int)
    names = json.loads(next(finished.glob(f"sub-{subject}/anat/*_probseg.json")).read_text())[
        "LabelMap"
    ]
    table = pd.read_csv(finished / "seg-varaug_dseg.tsv", sep="\t")
    assert list(table["name"]) == names
    scores = dice_with_truth(found, truth, table["index"][1:])
    assert np.nanmean(scores) >= LEAST_DICE[subject]


@pytest.mark.parametrize("subject", sorted(TRUTH))
def test_unreliable_voxels_hold_a_quarter_of_the_errors(finished, shared_data, subject):
    """docs/experiments/2026-11-30-uncertainty.md, for one member of each family."""
    unreliable, entropy = (
        np.asarray(nib.load(next(finished.glob(f"sub-{subject}/anat/*_{what}.nii.gz"))).dataobj)
        for what in ("label-unreliable_mask", "stat-totalentropy_statmap")
    )
    found, truth = labels_of(finished, subject), np.asarray(nib.load(shared_data / TRUTH[subject]).dataobj).astype(int)
    truth = np.select([truth == 31, truth == 63], [4, 43], truth)  # choroid plexus
    ids = pd.read_csv(finished / "seg-varaug_dseg.tsv", sep="\t")["index"]
    judged = np.isin(truth, ids) & ((truth > 0) | (found > 0))
    wrong = (found != truth)[judged]
    marked = unreliable[judged] > 0
    assert wrong[marked].mean() >= LEAST_PRECISION[subject]
    assert marked[wrong].mean() >= 0.25
    assert roc_auc_score(wrong, entropy[judged]) >= LEAST_AUC[subject]


def assert_left_is_left(image: nib.Nifti1Image) -> None:
    """The two hemispheres' white matter, in world coordinates."""
    labels = np.asarray(image.dataobj)
    left, right = (
        nib.affines.apply_affine(image.affine, np.argwhere(labels == index).mean(0))[0]
        for index in (2, 41)
    )
    assert left < right - 20  # mm


@pytest.mark.parametrize("subject", sorted(HEADS))
def test_left_is_left(finished, subject):
    path = next(finished.glob(f"sub-{subject}/anat/*_desc-consensus_dseg.nii.gz"))
    assert_left_is_left(nib.load(path))


@pytest.fixture(scope="module")
def adult_volumes(shared_data):
    """Smallest and largest volume of each structure among adults, mm3.

    FreeSurfer volumes of the 1043 people of 18 years or more among the 1000 Functional Connectomes
    (Biswal et al. 2010), as published by Rutherford et al. 2022 (eLife 11:e72904).
    """
    table = pd.read_csv(shared_data / "brain_age" / "fcon1000_freesurfer.tsv", sep="\t")
    table = table[table["age"] >= 18].rename(columns=MEASURES | RENAMED)
    assert len(table) == 1043
    return table.select_dtypes("number").agg(["min", "max"])


@pytest.mark.parametrize("subject", sorted(HEADS))
def test_volumes_are_those_of_adults(finished, adult_volumes, subject):
    table = next(finished.glob(f"sub-{subject}/anat/*_desc-consensus_dseg.tsv"))
    volumes = pd.read_csv(table, sep="\t").set_index("name")["volume_mean"]
    assert len(volumes) == 31
    unusual = outside(volumes, adult_volumes)
    assert unusual.empty, unusual


def outside(volumes: pd.Series, adults: pd.DataFrame, stretch: float = 1.0) -> pd.Series:
    """Return the volumes that no adult has."""
    bounds = adults[volumes.index]
    return volumes[(volumes < bounds.loc["min"]) | (volumes > stretch * bounds.loc["max"])]


@pytest.fixture(scope="module")
def baseline(shared_data):
    """Function that segments a T1w image with the baseline alone, on the image's own grid."""
    ensemble = load_ensemble("aseg31")
    network = load_member(ensemble, ensemble.baseline)
    ids = np.array([label.index for label in ensemble.labels], np.uint8)

    def segment(path: str, voxel_size: float) -> nib.Nifti1Image:
        head, geometry = prepare_head(shared_data / path, voxel_size, network.shape.multiple)
        if voxel_size == ensemble.voxel_size:
            head, geometry = crop_to_brain(network, head, geometry)
        labels = segment_volume(network, head).to_native(geometry)
        return nib.Nifti1Image(ids[labels], geometry.native_affine)

    return segment


def volumes_of(labels: nib.Nifti1Image) -> pd.Series:
    """Volume of each structure, mm3."""
    names = {label.index: label.name for label in load_ensemble("aseg31").labels[1:]}
    counts = np.bincount(np.asarray(labels.dataobj).ravel(), minlength=max(names) + 1)
    voxel = abs(np.linalg.det(labels.affine[:3, :3]))
    return pd.Series({name: counts[index] * voxel for index, name in names.items()})


@pytest.mark.parametrize(
    ("path", "voxel_size"), [*((path, 1.0) for path in OTHERS), *((path, 2.0) for path in OTHERS_AT_2MM)]
)
def test_baseline_finds_an_adult_brain(baseline, adult_volumes, path, voxel_size):
    labels = baseline(path, voxel_size)
    # Colin27 is stretched to the MNI template, which is larger than most heads.
    unusual = outside(volumes_of(labels), adult_volumes, 1.2 if "colin27" in path else 1.0)
    assert unusual.empty, unusual
    assert_left_is_left(labels)


def relative_differences(ours: pd.Series, theirs: pd.Series) -> pd.Series:
    assert len(ours) == 31
    return 2 * (ours - theirs).abs() / (ours + theirs)


def differences_when_resampled(output: Path, member: str) -> pd.Series:
    """Relative difference of a member's volumes of one head at 0.88 mm and at 1 mm."""

    def volumes(subject: str) -> pd.Series:
        table = pd.read_csv(next(output.glob(f"sub-{subject}/anat/*_morph.tsv")), sep="\t")
        return table[table["member"] == member].set_index("name")["volume"]

    return relative_differences(*map(volumes, RESAMPLED))


def labels_when_resampled(output: Path, desc: str) -> list[nib.Nifti1Image]:
    """Labels of that head on both grids."""
    return [
        nib.load(next(output.glob(f"sub-{s}/anat/*_desc-{desc}_dseg.nii.gz"))) for s in RESAMPLED
    ]


@pytest.mark.parametrize("member", ["ieee", "seed01"])
def test_volumes_hold_when_a_head_is_resampled(finished, member):
    differences = differences_when_resampled(finished, member)
    assert differences.max() < MOST_RESAMPLING, differences.nlargest(3)
    assert differences.mean() < MOST_RESAMPLING_ON_AVERAGE


def test_counted_voxels_hold_when_a_head_is_resampled(finished):
    counted = map(volumes_of, labels_when_resampled(finished, "ieee"))
    differences = relative_differences(*counted)
    slits = differences.index.str.endswith("Inf-Lat-Vent")
    most_of_slits, most, most_on_average = MOST_RESAMPLING_COUNTED
    assert differences[~slits].max() < most, differences.nlargest(3)
    assert differences[slits].max() < most_of_slits, differences[slits]
    assert differences.mean() < most_on_average


@pytest.mark.parametrize("desc", ["consensus", "ieee"])
def test_labels_overlap_when_a_head_is_resampled(finished, desc):
    native, conformed = labels_when_resampled(finished, desc)
    moved = resample_from_to(native, conformed, order=0)
    a, b = (np.asarray(image.dataobj) for image in (moved, conformed))
    dice = dice_with_truth(a, b, np.unique(b)[1:])
    assert np.mean(dice) > LEAST_RESAMPLING_DICE
