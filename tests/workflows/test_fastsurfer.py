"""The app with an ensemble of FastSurfer's architecture: small networks with random weights, a small head."""

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from nibabel.processing import resample_from_to

from bids_varaug import segment
from bids_varaug.cli.run import main
from bids_varaug.errors import UsageError
from bids_varaug.images.conform import insert
from bids_varaug.images.fastsurfer import prepare_volume
from bids_varaug.inputs.validation import run_validator
from bids_varaug.models.ensemble import Ensemble, Member, VinnShape, load_ensemble, write_manifest
from bids_varaug.models.fastsurfer import build_planes, load_planes, save_planes
from bids_varaug.models.fastsurfer_labels import IDS, read_labels
from bids_varaug.registration.space import SPACE
from bids_varaug.segmentation.fastsurfer import brain_mask
from bids_varaug.segmentation.partial_volume import corrected_volumes
from bids_varaug.segmentation.slices import segment_slices
from tests.derivatives.test_readers import read_table

SHAPE = VinnShape(filters=4, rim_filters=4, grid=32)


def write_small_ensemble(folder):
    """A baseline and a perturbed member that differs from it by a little."""
    members = []
    for seed, name, family in ((0, "ieee", "ieee"), (1, "mca01", "mca")):
        planes = build_planes(SHAPE, seed=5)
        for network in planes.values():
            network.classifier.conv.bias.data[0] += 2  # mostly background
            network.classifier.conv.bias.data[1] += 0.02 * seed
        sha256 = save_planes(folder / f"{name}.safetensors", {p: n.state_dict() for p, n in planes.items()})
        members.append(Member(name, family, seed, None, f"{name}.safetensors", sha256))
    write_manifest(Ensemble("small", "1", folder, 1.0, read_labels(), SHAPE, tuple(members), {}))


@pytest.fixture(scope="module")
def ensemble_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensembles") / "small"
    write_small_ensemble(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """One T1w image of 76 x 84 x 80 mm with a bright ball of 20 mm, in LPS."""
    root = tmp_path_factory.mktemp("bids")
    shape = (76, 84, 80)
    rng = np.random.default_rng(0)
    distance = np.linalg.norm(np.stack(np.indices(shape)) - np.reshape(shape, (3, 1, 1, 1)) / 2, axis=0)
    data = (np.where(distance < 10, 400 + rng.integers(0, 200, shape), 0) + rng.integers(0, 9, shape)).astype(np.int16)
    affine = np.diag([-1.0, -1, 1, 1])
    affine[:3, 3] = [38, 42, -40]
    path = root / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    path.parent.mkdir(parents=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    description = {"Name": "ball", "BIDSVersion": "1.10.0", "DatasetType": "raw"}
    (root / "dataset_description.json").write_text(json.dumps(description))
    (root / "README").write_text("A ball.\n")
    return root


@pytest.fixture(scope="module")
def derivatives(dataset, ensemble_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    work = tmp_path_factory.mktemp("work")
    code = main([str(dataset), str(out), "participant", "-w", str(work), "--ensemble", str(ensemble_dir),
                 "--perturb-inference", "1", "--omp-nthreads", "1", "--nprocs", "1", "--device", "cpu",
                 "--write-members", "--freesurfer-dir", str(out / "sourcedata" / "freesurfer")])  # fmt: skip
    assert code == 0
    return out


def test_outputs_are_named_after_fastsurfer_and_valid(derivatives):
    anat = derivatives / "sub-01" / "anat"
    names = {path.name for path in anat.iterdir()}
    assert "sub-01_seg-fastsurfer_desc-consensus_dseg.nii.gz" in names
    assert "sub-01_seg-fastsurfer_desc-members_morph.tsv" in names
    assert len(list(anat.glob("*_res-conformed_desc-*_dseg.json"))) == 4  # of the consensus and three members
    assert not any("seg-varaug" in path.name for path in derivatives.rglob("*"))
    assert (derivatives / "seg-fastsurfer_dseg.tsv").is_file()
    assert (derivatives / "sub-01.html").is_file()
    run_validator(derivatives)


def test_tables_have_95_structures_in_every_member(derivatives):
    anat = derivatives / "sub-01" / "anat"
    regions = pd.read_csv(anat / "sub-01_seg-fastsurfer_desc-consensus_dseg.tsv", sep="\t")
    assert regions["index"].tolist() == list(IDS[1:])
    members = pd.read_csv(anat / "sub-01_seg-fastsurfer_desc-members_morph.tsv", sep="\t")
    assert members.groupby("member").size().to_dict() == {"ieee": 95, "mca01": 95, "rr01": 95}


def test_labels_of_a_member_are_those_of_the_networks(derivatives, dataset, ensemble_dir):
    ensemble = load_ensemble(str(ensemble_dir))
    volume, geometry = prepare_volume(dataset / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    sparse = segment_slices(load_planes(ensemble, ensemble.members[0]), volume, geometry.voxel_size, geometry.box)
    assert len(np.unique(sparse.labels)) > 2
    stem = derivatives / "sub-01" / "anat" / "sub-01_seg-fastsurfer"
    conformed, native = (nib.load(f"{stem}_{part}desc-ieee_dseg.nii.gz") for part in ("res-conformed_", ""))
    wanted = insert(np.array(IDS)[sparse.labels], geometry.box, (256, 256, 256))
    np.testing.assert_array_equal(np.asanyarray(conformed.dataobj), wanted)
    # The T1w's grid is that one but for flips; of two classes that are equal to the last bit, the other may be chosen.
    back = np.asanyarray(resample_from_to(conformed, native, order=0).dataobj)
    assert (back == np.asanyarray(native.dataobj)).mean() > 0.9999


def test_template_space_is_refused_before_anything_is_written(dataset, ensemble_dir, tmp_path, capsys):
    out = tmp_path / "out"
    where = [str(dataset), str(out), "participant", "-w", str(tmp_path / "work"), "--ensemble", str(ensemble_dir)]
    assert main([*where, "--output-spaces", f"{SPACE}:res-2"]) == 64
    assert "FastSurfer's networks have it in parcels. Leave it out, or run the shipped" in capsys.readouterr().err
    assert not out.exists()


def test_statistics_are_those_of_the_labels_and_the_conformed_image(derivatives, dataset):
    """Volumes corrected for partial volume, in the form that asegstats2table reads; spread and labels beside."""
    subjects = derivatives / "sourcedata" / "freesurfer"
    names = {path.relative_to(subjects).as_posix() for path in subjects.rglob("*.*") if path.is_file()}
    parts = ("mri/aparc.DKTatlas+aseg.varaug.mgz", "stats/aseg+DKT.stats", "stats/aseg+DKT.varaug.tsv")
    assert names == {"aseg+DKT.varaug.LUT.txt", *(f"sub-01/{part}" for part in parts)}
    volume, stats, spread = (subjects / "sub-01" / part for part in parts)
    stem = derivatives / "sub-01" / "anat" / "sub-01_seg-fastsurfer"
    image, conformed = nib.load(volume), nib.load(f"{stem}_res-conformed_desc-consensus_dseg.nii.gz")
    labels = np.asanyarray(image.dataobj)
    np.testing.assert_array_equal(labels, np.asanyarray(conformed.dataobj))
    np.testing.assert_allclose(image.affine, conformed.affine, atol=1e-5)
    assert spread.read_bytes() == (stem.parent / f"{stem.name}_desc-consensus_dseg.tsv").read_bytes()
    t1w, _ = prepare_volume(dataset / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    table = read_table(stats)
    assert table["SegId"].tolist() == list(IDS[1:])
    counts = np.bincount(labels.ravel(), minlength=IDS[-1] + 1)[list(IDS[1:])]
    assert table["NVoxels"].tolist() == counts.tolist() and counts.any()
    volumes = corrected_volumes(labels, t1w, IDS[1:])
    np.testing.assert_allclose(table["Volume_mm3"], volumes, atol=5.01e-4)
    assert np.abs(volumes - counts).max() > 1
    means = [t1w[labels == index].mean() if count else 0 for index, count in zip(IDS[1:], counts, strict=True)]
    np.testing.assert_allclose(table["normMean"], means, atol=5.01e-5)
    # FreeSurfer's program takes the fields of these lines by commas.
    measures = dict(line[10:].split(", ")[1:4:2] for line in stats.read_text().splitlines() if "# Measure" in line)
    assert float(measures["MaskVol"]) == brain_mask(labels).sum()
    assert float(measures["BrainSegVol"]) == pytest.approx(volumes[np.array(IDS[1:]) != 16].sum(), rel=1e-6)
    assert "conformed by FastSurfer's rules and not corrected for" in stats.read_text()


def test_what_fastsurfer_cannot_do_is_refused(dataset, ensemble_dir):
    path = dataset / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    with pytest.raises(UsageError, match="FastSurfer's networks segment on their own grid"):
        segment(path, ensemble=ensemble_dir, sloppy=True)
    with pytest.raises(UsageError, match="--whole-voxels is for FastSurfer's networks"):
        segment(path, whole_voxels=True)
