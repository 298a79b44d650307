"""Validation on real heads: its arithmetic, and all of its scripts on a small head."""

import doctest
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_varaug.models.ensemble import load_ensemble
from bids_varaug.segmentation.fuse import SparsePosterior, sparse_rows
from bids_varaug.variability.measures import region_counts
from tests.workflows.conftest import head, small_ensemble, write_t1w  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import atrophy
import expected_dice
import heads
import minimum_dice
import rescan
import segment_heads
import spread
import validate_heads


@pytest.mark.parametrize("module", [atrophy, heads, rescan, spread, validate_heads])
def test_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


def test_labels_of_freesurfer_become_classes():
    ids = np.array([0, 4, 31, 63, 251, 24, 77])  # 31, 63: choroid plexus
    assert heads.as_classes(ids, "aseg", [0, 4, 43]).tolist() == [0, 1, 1, 2, -1, 0, -1]


def test_labels_of_muse_become_classes():
    ids = np.array([48, 47, 81, 82, 100, 101, 71, 69, 12])  # 12 is not an id of MUSE
    classes = heads.as_classes(ids, "dlmuse", [0, 17, 53, 41, 2, 42, 3, 12])
    assert classes.tolist() == [1, 2, 3, 4, 5, 6, -1, 0, 0]


def test_every_structure_of_the_shipped_ensemble_is_in_muse():
    ids = {label.index for label in load_ensemble("aseg31").labels}
    assert ids == set(heads.MUSE.values()) - {heads.NOT_JUDGED}


def test_voxels_that_are_not_judged_count_for_nothing():
    head = SimpleNamespace(truth=np.array([1, 1, -1, 0]), class_ids=[0, 2], names=["White"],
                           voxel_volume=2.0)  # fmt: skip
    [row] = heads.structure_scores(head, np.array([1, 0, 1, 1])).to_dict("records")
    assert row == {"structure": "White", "dice": 0.5, "volume": 4.0, "reference": 4.0}


def test_heads_are_found_with_the_labels_of_their_session(tmp_path):
    for session in ("ses-1", "ses-2"):
        write_t1w(tmp_path, f"sub-01_{session}")
        labels = tmp_path / "derivatives" / "manual" / "sub-01" / session / "anat"
        labels.mkdir(parents=True)
        (labels / f"sub-01_{session}_desc-aseg_dseg.nii.gz").touch()
        (labels / f"sub-01_{session}_desc-aal_dseg.nii.gz").touch()
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-01\t41\n")
    found = heads.find_heads(tmp_path)
    assert [one.name for one in found] == ["sub-01_ses-1", "sub-01_ses-2"]
    assert [Path(one.reference).name.split("_d")[0] for one in found] == [o.name for o in found]
    assert {(one.age, one.protocol) for one in found} == {(41, "aseg")}
    assert len({one.participant for one in found}) == 1


def test_auc_of_a_score_that_knows_and_of_one_that_does_not():
    wrong = np.array([0, 0, 1, 1], bool)
    assert spread.error_auc(np.array([0.1, 0.2, 0.3, 0.4]), wrong) == 1
    assert spread.error_auc(np.zeros(4), wrong) == 0.5
    assert np.isnan(spread.error_auc(np.zeros(4), np.zeros(4, bool)))


def test_volume_that_no_member_varies_is_infinitely_far_unless_it_is_right():
    volumes = np.array([[5.0, 5.0], [5.0, 5.0]])
    assert spread.distance_in_sd(np.array([5.0, 6.0]), volumes).tolist() == [0, np.inf]


def test_slope_has_a_wider_interval_where_people_scatter():
    age = np.array([20.0, 40.0, 60.0, 80.0])
    slope, low, high = validate_heads.slope_with_age(age, 1 + 0.01 * age + [0.1, -0.1, -0.1, 0.1])
    assert slope == pytest.approx(0.1) and low < 0 < high


def test_members_that_differ_by_more_than_the_margin_are_not_equivalent():
    assert validate_heads.equivalence(np.array([0.02, 0.021, 0.019]), 0.01)["p"] > 0.9


def test_minimum_dice_is_that_of_the_worst_pair_and_leaves_absent_structures_out():
    members = np.array([[1, 1, 0, 2], [1, 1, 0, 0], [1, 0, 0, 2]], np.uint8)
    least = minimum_dice.minimum_dice(region_counts([members], 3, 4), [0, 1, 2])
    np.testing.assert_allclose(least, [2 / 3, np.nan, np.nan])


def test_published_minimum_dice_is_that_of_the_paper(shared_data):
    names = [label.name for label in load_ensemble("aseg31").labels]
    found = {}
    for file, title in minimum_dice.PUBLISHED["training"].items():
        table = pd.read_csv(shared_data / "paper_tables" / file)
        shared = [name for name in names if name in table]
        found[title] = minimum_dice.mean_over_people(table, shared)
    assert {row["regions"] for row in found.values()} == {29}
    means = {title: round(row["minimum Dice"], 3) for title, row in found.items()}
    assert means["FreeSurfer, Monte Carlo arithmetic"] == 0.923
    assert means["FastSurfer, mca, epoch 9"] == 0.901
    assert found["FastSurfer, seeds, in distribution"]["left out"] == 3


def test_posterior_of_a_moved_image_comes_back_to_where_it_was():
    """A ramp of probabilities, which linear interpolation leaves a ramp."""
    shape, shift = (8, 8, 8), (0.5, -0.25, 0.0)
    x, y = np.meshgrid(np.arange(8.0), np.arange(8.0), indexing="ij")

    def ramp(x, y):
        return np.repeat((0.2 + 0.02 * x + 0.05 * y)[..., None], 8, axis=2).astype(np.float32)

    moved = ramp(x + shift[0], y + shift[1])
    rows = np.stack([1 - moved.ravel(), moved.ravel()], axis=1)
    sparse = SparsePosterior(np.zeros(shape, np.uint8), sparse_rows(rows, np.ones(len(rows), bool)))
    back = segment_heads.move_posterior(sparse, shift)
    dense = back.posterior[:, 1].reshape(shape)
    inside = (slice(1, -1),) * 3  # what came around the border is another matter
    np.testing.assert_allclose(dense[inside], ramp(x, y)[inside], atol=1e-6)


@pytest.fixture(scope="module")
def cache(small_ensemble, tmp_path_factory):  # noqa: F811
    """Two people segmented by small networks, with labels at random; and how to do it again."""
    folder = tmp_path_factory.mktemp("benchmarks")
    rng = np.random.default_rng(0)
    for subject in ("sub-01", "sub-02"):
        t1w = nib.load(write_t1w(folder / "data", subject, head(shape=(24, 28, 24))))
        path = folder / "data" / "derivatives" / "manual" / subject / "anat"
        path.mkdir(parents=True)
        labels = rng.choice([0, 2, 41, 16], t1w.shape).astype(np.int16)
        nib.save(nib.Nifti1Image(labels, t1w.affine), path / f"{subject}_desc-aseg31_dseg.nii.gz")
    (folder / "data" / "participants.tsv").write_text(
        "participant_id\tage\nsub-01\t30\nsub-02\t50\n"
    )

    def segment(*options: str) -> Path:
        run(segment_heads, folder / "data", "--cache", folder / "cache", "--ensemble",
            small_ensemble, "--rr", 2, "--shifts", 2, "--noise", 2, *options)  # fmt: skip
        return folder / "cache"

    return segment


def run(module, *arguments) -> None:
    """Run a script in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()


def test_head_is_segmented_once_unless_other_passes_are_wanted(cache, capsys):
    folder = cache("--minutes", "0")
    assert len(list(folder.glob("data/*.npz"))) == 1  # and stops after it
    cache()
    capsys.readouterr()
    cache()
    assert "2 heads, 0 to do, 11 passes" in capsys.readouterr().out
    assert len(heads.read_cache(folder)) == 2


def test_posteriors_that_are_kept_are_not_made_again(cache, tmp_path, monkeypatch):
    path = next(cache("--keep", str(tmp_path)).glob("data/*.npz"))
    first = path.rename(tmp_path / "first.npz")
    cache("--keep", str(tmp_path))
    path.unlink()
    monkeypatch.delattr(segment_heads.Pass, "run")
    cache("--keep", str(tmp_path))
    again = np.load(path)
    for name, values in np.load(first).items():
        np.testing.assert_array_equal(values, again[name])


def test_heads_of_other_members_are_not_mixed(cache, tmp_path):
    whole = cache()
    shutil.copytree(whole, tmp_path / "cache")
    path = next((tmp_path / "cache").glob("data/*.npz"))
    arrays = dict(np.load(path))
    meta = json.loads(str(arrays["meta"]))
    meta["passes"][1]["weights"] = "others"
    np.savez(path, **arrays | {"meta": json.dumps(meta)})
    with pytest.raises(SystemExit, match="other members"):
        heads.read_cache(tmp_path / "cache")


def test_what_is_kept_fits_together(cache):
    kept = heads.read_cache(cache())[0]
    assert kept.groups == ["mca", "all", "seed", "rr", "shift", "noise"]
    assert kept.of_family("all").sum() == 4
    voxels = len(kept.truth)
    assert kept.labels.shape == (11, voxels) and kept.intersections.shape == (7, 7, 4)
    assert kept.soft_dice("all").shape == kept.soft_dice("ieee").shape == (4,)
    for group in kept.groups:
        for measure in ("error_probability", *heads.MAPS):
            values = kept.map(group, measure)
            assert values.shape == (voxels,) and np.isfinite(values).all() and values.min() >= 0
    # Random rounding moves hardly anything; members, shifts and noise do.
    told = {group: kept.map(group, "mutual_information").mean() for group in kept.groups}
    assert told["rr"] < min(told[group] for group in ("mca", "seed", "shift", "noise"))


@pytest.mark.parametrize("script", [validate_heads, spread])
def test_scripts_judge_people_up_to_40_apart(script, cache, tmp_path, capsys):
    run(script, cache(), "--tsv", tmp_path / "rows.tsv")
    out = capsys.readouterr().out
    assert "2 heads of 2 people" in out and "data, up to 40" in out and "data, over 40" in out
    assert script is spread or "sub-02|0." in out  # a row for each head
    assert len(pd.read_csv(tmp_path / "rows.tsv", sep="\t")) > 20


def test_minimum_dice_is_printed_beside_the_published(cache, shared_data, capsys):
    run(minimum_dice, cache(), shared_data / "paper_tables")
    out = capsys.readouterr().out
    assert "`mca`, 2 members" in out and "FastSurfer, verrou_sr" in out


def test_expected_dice_is_fitted_compared_and_written_to_the_manifest(cache, small_ensemble, tmp_path, capsys):  # noqa: F811
    folder = shutil.copytree(small_ensemble, tmp_path / "mine")
    run(expected_dice, cache(), cache(), "--write", folder, "--tsv", tmp_path / "rows.tsv")
    out = capsys.readouterr().out
    assert "Consensus of all" in out and "closed form" in out and "`ieee` alone" in out
    rows = pd.read_csv(tmp_path / "rows.tsv", sep="\t")
    assert set(rows["group"]) == {"all", "ieee"} and rows["soft_dice"].between(0, 1).all()
    assert rows.loc[rows["group"] == "all", "pair_dice"].notna().all()
    before, after = (load_ensemble(str(path)) for path in (small_ensemble, folder))
    assert before.quality is None and after.quality.heads == ("sub-01", "sub-02")
    assert after == replace(before, quality=after.quality, directory=after.directory)


def shrinking_ball(factor):
    """Labels of a ball, and the field that scales its volume."""
    distance = np.indices((40, 40, 40), np.float32) - 19.5
    labels = (np.sqrt((distance**2).sum(axis=0)) < 9).astype(np.uint8)
    return labels, ((slice(None),) * 3, distance * (factor ** (-1 / 3) - 1))


@pytest.mark.parametrize("factor", [0.95, 0.8, 1.1])
def test_change_that_a_deformation_makes_is_that_of_its_factor(factor):
    labels, field = shrinking_ball(factor)
    made = atrophy.exchange_made(labels, field, 2)
    assert atrophy.relative_change(made, 1, labels.sum()) == pytest.approx(100 * (factor - 1), abs=0.6)
    assert made[0, 1] - made[1, 0] == pytest.approx(labels.sum() * (factor - 1), rel=0.1)
    assert atrophy.deform(labels.astype(np.float32), [field]).sum() / labels.sum() == pytest.approx(factor, abs=0.006)


def test_targets_that_move_the_same_voxels_are_refused():
    labels, field = shrinking_ball(0.9)
    with pytest.raises(SystemExit, match="24 mm apart"):
        atrophy.deform(labels.astype(np.float32), [field, field])


def test_recovery_is_of_the_members_own_label(capsys):
    row = {"image": "17 x 0.9", "structure": "Left-Hippocampus", "volume": 5000, "reference": 4000, "found": -6.0,
           "made": -9.0, "made in reference": -10.0}  # fmt: skip
    flow = {"image": "17 x 0.9", "structure": "Left-Hippocampus", "neighbour": "Left-Amygdala"}
    flow |= {"made": 90.0, "found": 60.0}
    atrophy.print_results(pd.DataFrame([row, row]), pd.DataFrame([flow, flow]))
    out = capsys.readouterr().out
    assert "0.9|Left-Hippocampus|-10.000|-9.000|-6.000|0.667|1.250" in out
    assert "Left-Hippocampus|Left-Amygdala|1.000|0.667" in out


def test_scans_differ_beyond_what_members_do():
    first = np.array([[99.0, 50], [101, 52]])
    table = rescan.compare_scans(first, first * [1.1, 1])
    assert table["scans"].tolist() == pytest.approx([100 * 0.1 / 1.05, 0])
    assert table["paired SD"][1] == 0 and table["SD"][1] == pytest.approx(100 * 2**0.5 / 51)


def test_weights_without_a_manifest_are_an_ensemble(tmp_path):
    for name in ("seed01", "ieee"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"x")
    ensemble = heads.load_members(str(tmp_path))
    assert [(member.id, member.family) for member in ensemble.members] == [("ieee", "ieee"), ("seed01", "seed")]


