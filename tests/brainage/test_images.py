"""Features of images: what an encoder sees, what is kept, what is left out."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from bids_varaug.brainage import images
from bids_varaug.brainage.cohort import CohortError
from bids_varaug.brainage.gather import gather_cohort
from bids_varaug.brainage.model_file import ModelError
from bids_varaug.errors import EnsembleError, ScanError
from bids_varaug.inputs.participants import read_people
from bids_varaug.models.encoders import SHAPE, load_encoder, load_encoders
from tests.brainage.brains import MEMBERS, head, write_dataset, write_encoder


def save(data, affine, path):
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


@pytest.fixture
def coarse(monkeypatch):
    """Voxels of 4 mm: an eighth of the time."""
    monkeypatch.setattr(images, "SHAPE", (40, 48, 40))
    monkeypatch.setattr(images, "VOXEL_SIZE", 4.0)


@pytest.fixture
def dataset(tmp_path, coarse):
    return write_dataset(tmp_path, 3)


@pytest.fixture
def encoder(tmp_path):
    return write_encoder(tmp_path / "encoder")


def gather(dataset, encoder, **options):
    bids, out = dataset
    volumes = gather_cohort(out, read_people(bids))
    return images.gather_images(bids, out, volumes, load_encoders(encoder), **options)


def test_a_brain_is_centred_whatever_the_images_axes_and_place(tmp_path):
    image, mask = head(50, 0)
    image, mask = (np.pad(x, ((0, 0), (20, 0), (0, 0))) for x in (image.astype(np.float32), mask.astype(np.uint8)))
    affine = np.diag([3.0, 3, 3, 1])
    brain = images.load_brain(save(image, affine, tmp_path / "a.nii"), save(mask, affine, tmp_path / "am.nii"))
    assert brain.shape == SHAPE and brain.dtype == torch.float32 and 0 <= brain.min() < brain.max() <= 1.5
    inside = np.argwhere(brain.numpy() > 0)
    np.testing.assert_allclose((inside.min(axis=0) + inside.max(axis=0) + 1) / 2, np.array(SHAPE) / 2, atol=1)
    extent = 3.0 * np.ptp(np.argwhere(mask), axis=0)  # mm
    np.testing.assert_allclose(2.0 * np.ptp(inside, axis=0), extent, atol=4)
    swapped, flipped = (x[::-1].transpose(2, 0, 1).copy() for x in (image, mask))
    turned = np.array([[0, -3.0, 0, 141], [0, 0, 3, 0], [3, 0, 0, 0], [0, 0, 0, 1]])
    other = images.load_brain(save(swapped, turned, tmp_path / "b.nii"), save(flipped, turned, tmp_path / "bm.nii"))
    np.testing.assert_allclose(other, brain, atol=1e-3)  # quantiles come from every third voxel


def test_a_mask_that_reaches_down_the_spinal_cord_does_not_move_the_brain(tmp_path):
    image, mask = (np.pad(x.astype(np.float32), ((0, 0), (0, 0), (20, 0))) for x in head(50, 0))
    affine = np.diag([3.0, 3, 3, 1])
    cord = mask.copy()
    cord[24:26, 24:26, :40] = 1  # 60 mm longer than the brain
    shown = [images.load_brain(save(image, affine, tmp_path / "a.nii"), save(m, affine, tmp_path / f"m{n}.nii"))
             for n, m in enumerate((mask, cord))]  # fmt: skip
    heights = [np.average(np.arange(SHAPE[2]), weights=brain.numpy().sum(axis=(0, 1))) for brain in shown]
    assert abs(heights[0] - heights[1]) <= 2  # voxels


def test_features_are_those_of_every_member_and_of_the_untrained_network(dataset, encoder):
    cohort, volumes = gather(dataset, encoder)
    assert cohort.source["kind"] == "images" and cohort.member_ids == MEMBERS[1:]
    assert list(cohort.people["observation"]) == list(volumes.people["observation"]) == ["sub-01", "sub-02", "sub-03"]
    brain = images.load_brain(*image_and_mask(dataset, 2))[None, None]
    ensemble = load_encoders(encoder)
    for member, values in zip(ensemble.members, (cohort.baseline, *cohort.members.transpose(1, 0, 2)), strict=True):
        features = load_encoder(ensemble, member).features(brain)[0].numpy()
        kept = [int(name[1:]) - 1 for name in cohort.names]
        np.testing.assert_allclose(values[1], features[kept], rtol=1e-5)
    assert cohort.controls["untrained"].shape == (3, 64) and np.ptp(cohort.controls["untrained"]) > 0
    np.testing.assert_allclose(cohort.controls["volumes"].sum(axis=1), 1)  # divided by the brain's
    assert set(dict.fromkeys(cohort.source["dropped_features"].values())) == {"always 0"}  # of dead units


def image_and_mask(dataset, person):
    who = f"sub-{person:02d}"
    return dataset[0] / who / f"anat/{who}_T1w.nii.gz", dataset[1] / who / f"anat/{who}_desc-brain_mask.nii.gz"


def test_features_are_made_again_only_where_something_changed(dataset, encoder, tmp_path, monkeypatch):
    seen = []
    load = images.load_brain
    monkeypatch.setattr(images, "load_brain", lambda t1w, *rest: seen.append(t1w.name[:6]) or load(t1w, *rest))
    first, _ = gather(dataset, encoder)
    assert seen == ["sub-01", "sub-02", "sub-03"]
    seen.clear()
    again, _ = gather(dataset, encoder)
    assert seen == []
    np.testing.assert_array_equal(first.members, again.members)
    tables = [path.parent / f"{path.name[:6]}_desc-encoder_features.tsv" for _, path in map_people(dataset)]
    tables[0].write_text(tables[0].read_text()[:-40])  # truncated
    tables[1].with_suffix(".json").unlink()  # interrupted between table and sidecar
    _, mask = image_and_mask(dataset, 3)
    smaller = np.asarray(nib.load(mask).dataobj).copy()
    smaller[:, :, :15] = 0
    save(smaller, nib.load(mask).affine, mask)
    gather(dataset, encoder)
    assert seen == ["sub-01", "sub-02", "sub-03"]
    seen.clear()
    other, _ = gather(dataset, write_encoder(tmp_path / "other", seed=2))
    assert seen == ["sub-01", "sub-02", "sub-03"] and not np.allclose(other.baseline[0, 0], first.baseline[0, 0])
    sidecar = json.loads(tables[0].with_suffix(".json").read_text())
    assert set(sidecar["Encoder"]["SHA256"]) == {*MEMBERS, "alignment"}


def test_members_that_were_not_compared_are_refused(dataset, encoder):
    """Their features would be taken for the same ones."""
    path = encoder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"training": {}}))
    with pytest.raises(EnsembleError, match="were not brought to those of ieee"):
        gather(dataset, encoder)
    path.write_text(json.dumps(manifest))
    (encoder / "alignment.safetensors").unlink()
    with pytest.raises(EnsembleError, match=r"alignment\.safetensors: missing"):
        gather(dataset, encoder)


def test_an_interrupted_run_keeps_what_it_made(dataset, encoder, monkeypatch):
    seen, load = [], images.load_brain

    def interrupt(t1w, *rest):
        seen.append(t1w.name[:6])
        if len(seen) == 3:
            raise KeyboardInterrupt
        return load(t1w, *rest)

    monkeypatch.setattr(images, "load_brain", interrupt)
    with pytest.raises(KeyboardInterrupt):
        gather(dataset, encoder)
    cohort, _ = gather(dataset, encoder)
    assert seen == ["sub-01", "sub-02", "sub-03", "sub-03"] and len(cohort) == 3


def map_people(dataset):
    return [image_and_mask(dataset, person) for person in (1, 2, 3)]


def test_images_that_cannot_be_used_are_left_out_with_the_reason(dataset, encoder):
    for person, what in ((1, "image"), (2, "mask")):
        t1w, mask = image_and_mask(dataset, person)
        (t1w if what == "image" else mask).unlink()
    cohort, volumes = gather(dataset, encoder)
    assert list(cohort.people["observation"]) == list(volumes.people["observation"]) == ["sub-03"]
    assert "no such file" in cohort.left_out["sub-01"] and "desc-brain_mask" in cohort.left_out["sub-02"]
    assert len(cohort.controls["volumes"]) == len(cohort.controls["untrained"]) == 1
    t1w, _ = image_and_mask(dataset, 3)
    t1w.write_bytes(b"no image")
    gather(dataset, encoder)  # features made before stay
    next(dataset[1].glob("sub-03/anat/*_morph.json")).write_text("{}")
    with pytest.raises(CohortError, match="nobody is left.*names its T1w image"):
        gather(dataset, encoder)


@pytest.mark.parametrize(
    ("mask", "message"), [(np.ones((4, 4, 4)), "field of view"), (np.zeros((48, 56, 48)), "every voxel is 0"),
                          (np.pad(np.ones((48, 56, 40)), ((0, 0), (0, 0), (0, 4))), "not of the grid")],
)  # fmt: skip
def test_masks_that_do_not_fit_are_refused(dataset, mask, message):
    t1w, path = image_and_mask(dataset, 1)
    save(mask.astype(np.uint8), np.diag([3.0, 3, 3, 1]), path)
    with pytest.raises(ScanError, match=message):
        images.load_brain(t1w, path)


def test_damaged_weights_are_refused(dataset, encoder):
    (encoder / "mca02.safetensors").write_bytes(b"damaged")
    with pytest.raises(EnsembleError, match=r"mca02\.safetensors: missing, or not as the manifest says"):
        gather(dataset, encoder)
    assert not list(dataset[1].rglob("*_features.*"))


def test_weights_of_another_architecture_are_refused(dataset, tmp_path):
    folder = write_encoder(tmp_path / "other", n_outputs=3)  # its manifest says two
    with pytest.raises(EnsembleError, match="do not fit the manifest's architecture"):
        gather(dataset, folder)


def test_a_model_is_for_the_encoder_it_was_fitted_with(encoder, tmp_path):
    own = load_encoders(encoder)
    source = {"encoder": "small", "architecture": "sfcn", "sha256": {m.id: m.sha256 for m in own.members}}
    images.check_encoder(source, own)
    images.check_encoder(source, load_encoders(write_encoder(tmp_path / "one", ids=MEMBERS[:1])))  # part of it
    strangers = {"weights": write_encoder(tmp_path / "a", seed=2), "ids": write_encoder(tmp_path / "b", ids=["seed01"])}
    for folder in strangers.values():
        with pytest.raises(ModelError, match="not the encoder that the model was fitted with, which is small"):
            images.check_encoder(source, load_encoders(folder))
