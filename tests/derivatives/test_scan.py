"""The derivatives of one scan, from a work directory made by hand."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_varaug.derivatives import scan as scans
from bids_varaug.derivatives.names import LOOKUP_TABLE, OUTPUTS, ScanRequest
from bids_varaug.images.conform import POSTERIOR_SCALE, Box, Geometry
from bids_varaug.inputs.scans import Scan
from bids_varaug.models.ensemble import DiceModel, Ensemble, Label, Member, NetworkShape, Quality
from bids_varaug.segmentation.fuse import SparsePosterior, Summary, save_posterior, sparse_rows
from bids_varaug.settings import Settings

SHAPE = (6, 6, 6)
SPREAD = ("entropy", "mutual_information", "sigbits", "std")
LABELS = (Label(0, "Background", "#000000"), Label(17, "Left-Hippocampus", "#dcd814"))
MEMBERS = tuple(
    Member(name, name.rstrip("0123456789"), 0, None, "", "a" * 64)
    for name in ("ieee", "mca01", "mca02")
)


@dataclass(frozen=True)
class Intermediate:
    """Files of the work directory that the derivatives are made of."""

    geometry: Path
    mean: Path
    maps: Path
    counts: Path
    posteriors: tuple[Path, ...]


def write_scan(request: ScanRequest, files: Intermediate, folder: Path):
    summary = Summary(files.mean, files.maps, files.counts)
    return scans.write_scan(request, files.geometry, files.posteriors, summary, folder)


@pytest.fixture
def request_(tmp_path) -> ScanRequest:
    """Three members on a T1w whose grid is the network's."""
    path = tmp_path / "raw" / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    path.parent.mkdir(parents=True)
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.float32), np.eye(4)), path)
    settings = Settings(tmp_path / "raw", tmp_path / "out", "participant", tmp_path / "work")
    scan = Scan(path, {"subject": "01"}, "sub-01/anat/sub-01_T1w.nii.gz")
    shape = NetworkShape(2, (16, 16), 16)
    ensemble = Ensemble("small", "1", Path(), 1.0, LABELS, shape, MEMBERS, {})
    return ScanRequest(settings, ensemble, MEMBERS, scan)


@pytest.fixture
def files(tmp_path) -> Intermediate:
    """One labelled voxel in every member; maps that tell each other apart."""
    geometry = Geometry(1.0, Box((0, 0, 0), SHAPE), SHAPE, np.eye(4), SHAPE, np.eye(4), 300.0, ())
    geometry.save(tmp_path / "geometry.json")
    labels = np.zeros(SHAPE, np.uint8)
    labels[2, 3, 4] = 1
    rows = sparse_rows(np.array([[0.2, 0.8]], np.float32), labels.ravel() > 0)
    sparse = SparsePosterior(labels, rows)
    save_posterior(tmp_path / "mean.safetensors", sparse)
    maps = {"entropy": 0.5, "std": 0.1, "sigbits": 3.0, "total_entropy": 0.75, "mutual_information": 0.25}
    maps = {name: np.full(SHAPE, value, np.float32) for name, value in maps.items()}
    np.savez(tmp_path / "maps.npz", **maps)
    counts = np.tile(np.array([215, 1], np.int64), (3, 1))
    np.savez(
        tmp_path / "counts.npz",
        volumes=counts,
        intersections=np.tile(counts[0], (3, 3, 1)),
        entropy_mean=np.array([0.0, 0.5]),
        entropy_mean_mca=np.array([0.0, 0.25]),
        uncertainty_mean=np.array([0.0, 0.75]),
        soft_dice=np.array([np.nan, 0.8]),
    )
    mean = tmp_path / "mean.safetensors"
    return Intermediate(
        tmp_path / "geometry.json", mean, tmp_path / "maps.npz", tmp_path / "counts.npz",
        (mean,) * 3,
    )  # fmt: skip


def outputs(request: ScanRequest) -> set[str]:
    """Keys of what lies in the output folder, of images and tables."""
    return {key for key, output in OUTPUTS.items() if not output.per_member and request.path(key).exists()}


def test_every_output_but_those_of_members_is_written(request_, files, tmp_path):
    write_scan(request_, files, tmp_path)
    assert outputs(request_) == {key for key, output in OUTPUTS.items() if not output.per_member}


def test_spread_of_an_earlier_run_is_not_left_beside_a_consensus_without_one(
    request_, files, tmp_path
):
    write_scan(request_, files, tmp_path)
    alone = replace(request_, members=MEMBERS[:1])
    counts = dict(np.load(files.counts))
    counts["volumes"], counts["intersections"] = (
        counts["volumes"][:1], counts["intersections"][:1, :1],
    )  # fmt: skip
    np.savez(files.counts, **counts)
    write_scan(alone, replace(files, posteriors=files.posteriors[:1]), tmp_path)
    assert outputs(alone) == {k for k, o in OUTPUTS.items() if not o.per_member} - set(SPREAD)
    folder = request_.settings.output_dir / "sub-01" / "anat"
    assert [path.name for path in folder.glob("*_statmap.json")] == [request_.sidecar("total_entropy").name]


def test_maps_of_a_family_are_written_beside_those_of_all(request_, files, tmp_path):
    maps = dict(np.load(files.maps))
    theirs = {f"{name}_mca": values * 0 if name == "entropy" else values
              for name, values in maps.items()}  # fmt: skip
    np.savez(files.maps, **maps, **theirs)
    written, _ = write_scan(request_, files, tmp_path)
    paths = {key: request_.path(f"{key}_of_family", "mca") for key in SPREAD}
    assert set(paths.values()) <= set(written)
    assert nib.load(paths["entropy"]).get_fdata().max() == 0
    sidecar = json.loads(request_.sidecar("entropy_of_family", "mca").read_text())
    assert sidecar["Members"] == ["mca01", "mca02"]
    assert sidecar["MembersPerFamily"] == {"mca": 2}
    assert json.loads(request_.sidecar("total_entropy_of_family", "mca").read_text())["Temperature"] == 1


def test_table_and_sidecar_tell_families_apart(request_, files, tmp_path):
    members = (*MEMBERS, Member("seed01", "seed", 0, None, "", "b" * 64))
    counts = dict(np.load(files.counts))
    counts["volumes"] = np.vstack([counts["volumes"], [[200, 16]]])
    counts["intersections"] = np.tile(counts["volumes"][0], (4, 4, 1))
    np.savez(files.counts, **counts)
    request = replace(request_, members=members)
    write_scan(request, replace(files, posteriors=files.posteriors[:1] * 4), tmp_path)
    row, sidecar = told(request)
    assert (row["volume_mean"], row["volume_mean_mca"]) == (6, 1)
    assert (row["entropy_mean"], row["entropy_mean_mca"]) == (0.5, 0.25)
    assert np.isnan(row["volume_mean_seed"]) and np.isnan(row["cv_seed"])
    assert sidecar["MembersPerFamily"] == {"mca": 2, "seed": 1}
    assert "Family mca has 2 members: below 5, its spread is uncertain." in sidecar["Warnings"]
    assert "Family seed has one member: below 5, its spread is unknown." in sidecar["Warnings"]
    assert sidecar["cv_seed"]["Description"] == "As cv, within the seed family"


def test_posterior_is_stored_in_steps_of_a_255th(request_, files, tmp_path):
    write_scan(request_, files, tmp_path)
    assert 1 / OUTPUTS["mean_probseg"].per_unit == POSTERIOR_SCALE
    path = request_.path("mean_probseg")
    image = nib.load(path)
    assert image.get_data_dtype() == np.uint8
    assert image.get_fdata()[2, 3, 4] == pytest.approx([0.2, 0.8], abs=1 / 510)
    assert image.get_fdata()[0, 0, 0].tolist() == pytest.approx([1, 0])


def test_maps_are_stored_in_the_steps_of_their_output(request_, files, tmp_path):
    maps = dict(np.load(files.maps))
    values = {"entropy": 0.7, "std": 0.123, "sigbits": 5.3}
    np.savez(files.maps, **maps | {name: maps[name] * 0 + np.float32(value) for name, value in values.items()})
    write_scan(request_, files, tmp_path)
    for key, value in values.items():
        image, output = nib.load(request_.path(key)), OUTPUTS[key]
        found = image.get_fdata()[2, 3, 4]
        step = 1 / output.per_unit if output.per_unit else 2.0**-15  # the power of 2 above 0.123 is 2**-3
        assert (image.get_data_dtype(), image.dataobj.slope) == (np.int16, step)
        assert found == np.rint(value / step) * step and abs(found - value) <= step / 2
        assert f"steps of {step:.4g}" in json.loads(request_.sidecar(key).read_text())["Precision"]


@pytest.mark.parametrize("magnitude", [1e-9, 1e-3])
def test_small_spread_is_not_rounded_away(request_, files, tmp_path, magnitude):
    """As that of random rounding at inference."""
    maps = dict(np.load(files.maps))
    maps["std"] = np.linspace(0, magnitude, np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    np.savez(files.maps, **maps)
    write_scan(request_, files, tmp_path)
    found = nib.load(request_.path("std")).get_fdata()
    assert np.abs(found - maps["std"]).max() <= magnitude / 4096


def test_headers_tell_viewers_what_the_images_are(request_, files, tmp_path):
    write_scan(request_, files, tmp_path)
    shown = {
        "consensus_dseg": ("label", 17), "ieee_dseg": ("label", 17), "entropy": ("estimate", 2),
        "sigbits": ("estimate", 24), "brain_mask": ("none", 1), "mean_probseg": ("none", 1),
    }  # fmt: skip
    for key, (intent, cal_max) in shown.items():
        header = nib.load(request_.path(key)).header
        assert (header.get_intent()[0], header["cal_min"], header["cal_max"]) == (intent, 0, cal_max), key
    aux = nib.load(request_.path("consensus_dseg")).header["aux_file"].item().decode()
    assert (request_.settings.output_dir / aux).name == LOOKUP_TABLE


def test_significant_bits_are_those_of_the_brain(request_, files, tmp_path):
    write_scan(request_, files, tmp_path)
    bits, brain = (nib.load(request_.path(key)).get_fdata() for key in ("sigbits", "brain_mask"))
    assert brain.sum() == 7 and bits[2, 3, 4] == 3  # the voxel and those that share a face
    assert (bits[brain == 0] == 0).all()


def test_sidecar_tells_volumes_of_the_brain_as_what_they_are(request_, files, tmp_path):
    write_scan(request_, files, tmp_path)
    volumes = told(request_)[1]["Volumes"]
    assert {name: of["Value"] for name, of in volumes.items()} == {"brain": 1.0, "brain_mask": 7.0}
    assert all(of["Units"] == "mm^3" and "o intracranial volume" in of["Description"] for of in volumes.values())


@pytest.mark.parametrize(("temperature", "marked"), [(1.0, 0), (4.0, 1)])
def test_voxel_is_unreliable_where_the_calibrated_posterior_says_so(request_, files, tmp_path, temperature, marked):
    """0.8 is 0.59 at a temperature of 4: 1 / (1 + 0.25 ** (1 / 4))."""
    request = replace(request_, ensemble=replace(request_.ensemble, temperature=temperature))
    write_scan(request, files, tmp_path)
    assert np.count_nonzero(nib.load(request.path("unreliable_mask")).get_fdata()) == marked
    posterior = nib.load(request.path("mean_probseg")).get_fdata().max(axis=-1)
    sidecar = json.loads(request.sidecar("unreliable_mask").read_text())
    assert np.count_nonzero(1 - posterior >= sidecar["Threshold"]) == marked
    assert sidecar["Temperature"] == temperature and "wrong" in sidecar["ThresholdDescription"]


def test_expected_dice_and_uncertainty_stand_in_the_table(request_, files, tmp_path):
    write_scan(request_, files, tmp_path)
    row, sidecar = told(request_)
    assert (row["expected_dice"], row["uncertainty_mean"]) == (0.8, 0.75)
    assert np.isnan(row["expected_dice_low"]) and "Nobody calibrated" in sidecar["ExpectedDiceDescription"]
    model = DiceModel(0.0, 0.0, 0.0, 0.0, -1.0, 1.0)
    ensemble = replace(request_.ensemble, quality=Quality(model, model, 0.9, ("head",)))
    write_scan(replace(request_, ensemble=ensemble), files, tmp_path)
    row, sidecar = told(request_)
    measures = ("expected_dice_low", "expected_dice", "expected_dice_high")
    assert row[[*measures]].tolist() == pytest.approx([0.269, 0.5, 0.731], abs=1e-3)
    assert "expected Dice 0.50" in row["reason"] and "1 heads" in sidecar["ExpectedDiceDescription"]


def test_sidecar_says_where_to_look_first(request_, files, tmp_path):
    write_scan(request_, files, tmp_path)
    (place,) = told(request_)[1]["LookFirst"]
    assert place["Voxel"] == [2, 3, 4] and place["World"] == [2, 3, 4]
    assert (place["Structure"], place["Index"]) == ("Left-Hippocampus", 17)
    assert "expected to be wrong" in place["Reason"]


def test_labels_are_freesurfer_ids(request_, files, tmp_path):
    write_scan(request_, files, tmp_path)
    labels = np.asarray(nib.load(request_.path("consensus_dseg")).dataobj)
    assert labels[2, 3, 4] == 17 and np.count_nonzero(labels) == 1


def told(request: ScanRequest) -> tuple[pd.Series, dict]:
    """Row of the table of regions, and its sidecar."""
    table = pd.read_csv(request.path("regions_tsv"), sep="\t", na_values="n/a")
    return table.iloc[0], json.loads(request.sidecar("regions_tsv").read_text())


def test_verdicts_stand_in_table_and_sidecar_and_are_told(request_, files, tmp_path):
    _, doubts = write_scan(request_, files, tmp_path)
    row, sidecar = told(request_)
    assert row["verdict"] == "unreliable"
    assert "1 voxels (fewer than 100)" in row["reason"] and "2 members" in row["reason"]
    assert set(doubts) < set(sidecar["Warnings"]) and "Left-Hippocampus" in doubts[-1]
    assert set(sidecar["verdict"]["Levels"]) >= {row["verdict"]}


def test_voxels_are_those_of_the_coarser_grid(request_, files, tmp_path):
    """500 voxels of the network's grid are eight times fewer of a T1w of 2 mm."""
    counts = dict(np.load(files.counts))
    counts["volumes"] = np.tile(np.array([215, 500], np.int64), (3, 1))
    counts["intersections"] = np.tile(counts["volumes"][0], (3, 3, 1))
    np.savez(files.counts, **counts)
    write_scan(request_, files, tmp_path)
    assert "voxels" not in told(request_)[0]["reason"]
    geometry = Geometry.load(files.geometry)
    replace(geometry, native_affine=np.diag([2.0, 2, 2, 1])).save(files.geometry)
    write_scan(request_, files, tmp_path)
    assert "62 voxels (fewer than 100)" in told(request_)[0]["reason"]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (None, "the age is unknown."),
        ("participant_id\tage\tsex\nsub-01\t63\tF\n", "women of 63 years."),
        ("participant_id\tage\nsub-02\t63\n", "the age is unknown."),
        ("participant_id\tage\nsub-01\t12\n", "none for 12 years."),
        ("participant_id\tage\nsub-01\t999\n", "the age is unknown (participants.tsv"),
        ("participant_id\tage\nsub-01\n", "the age is unknown (/"),
        ("", "is empty"),
        ("participant_id,age\nsub-01,63\n", "needs tabs"),
        ("age\n63\n", "no column 'participant_id'"),
        ("participant_id\tage\nsub-01\t63\nsub-01\t64\n", "more than once"),
    ],
)
def test_age_is_used_where_known_and_never_stops_a_scan(request_, files, tmp_path, table, words):
    if table is not None:
        (request_.settings.bids_dir / "participants.tsv").write_text(table)
    write_scan(request_, files, tmp_path)
    limits = told(request_)[1]["VolumeLimits"]
    assert words in limits and "\n" not in limits


def test_age_at_the_session_goes_first(request_, files, tmp_path):
    folder = request_.settings.bids_dir
    (folder / "participants.tsv").write_text("participant_id\tage\nsub-01\t30\nsub-02\t40\n")
    sessions = "session_id\tage\nses-a\t31\nses-b\t71\n"
    (folder / "sub-01" / "sub-01_sessions.tsv").write_text(sessions)
    scan = replace(request_.scan, entities={"subject": "01", "session": "b"})
    write_scan(replace(request_, scan=scan), files, tmp_path)
    assert "71 years" in told(request_)[1]["VolumeLimits"]
