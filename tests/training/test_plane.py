"""Training of one plane, with networks of a few channels on small heads."""

import nibabel as nib
import numpy as np
import pytest
import torch

from bids_varaug.cli.train import main
from bids_varaug.errors import UserError
from bids_varaug.models.ensemble import VinnShape
from bids_varaug.models.fastsurfer import Vinn, n_classes_of
from bids_varaug.models.fastsurfer_labels import NETWORK_IDS
from bids_varaug.training.fastsurfer import network_ids, parcel_scheme, voxel_weights
from bids_varaug.training.plane import Head, PlaneRecipe, SyntheticHeads, load_heads, train_plane
from bids_varaug.training.recipe import plan_member

TINY = VinnShape(filters=4, rim_filters=4, grid=16)


def recipe_of(epochs, plane="coronal", **changes):
    return PlaneRecipe(plane, TINY, epochs, batch=4, side=20, **changes)


@pytest.fixture(scope="module")
def heads():
    """Two cubes in cubes of 16 voxels: white matter within a parcel."""
    rng, made = np.random.default_rng(0), []
    for size in (4, 5):
        classes = np.zeros((16, 16, 16), np.uint8)
        classes[2:14, 2:14, 2:14], classes[size:-size, size:-size, size:-size] = 34, 1
        image = (np.array([0, 200, *[0] * 32, 100])[classes] + rng.integers(0, 20, classes.shape)).astype(np.uint8)
        made.append(Head(image, classes, voxel_weights(classes, "coronal"), 1.0))
    return made


def train(heads, out, epochs, member="ieee", start=None, **changes):
    return train_plane(recipe_of(epochs, **changes), heads, plan_member(member), out, start)


def same(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_stopped_training_ends_with_the_same_bits(heads, tmp_path):
    whole = train(heads, tmp_path / "whole.pkl", 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bids_varaug.training.plane._batches", stop_after(2))
        with pytest.raises(KeyboardInterrupt):
            train(heads, tmp_path / "parts.pkl", 3)
    assert same(train(heads, tmp_path / "parts.pkl", 3), whole)


def stop_after(epochs):
    from bids_varaug.training import plane

    before = plane._batches

    def batches(samples, recipe, seed, epoch):
        if epoch == epochs:
            raise KeyboardInterrupt
        return before(samples, recipe, seed, epoch)

    return batches


def test_training_learns(heads, tmp_path, capsys):
    train(heads, tmp_path / "coronal.pkl", 12, scale_sd=0.0)
    losses = [float(line.rpartition("loss ")[2]) for line in capsys.readouterr().err.splitlines()]
    assert losses[-1] < 0.7 * losses[0]


def test_members_differ_by_what_they_are_named_for(heads, tmp_path):
    baseline, again, seed, perturbed = (
        train(heads, tmp_path / f"{n}.pkl", 1, member) for n, member in enumerate(("ieee", "ieee", "seed01", "mca01"))
    )
    assert same(baseline, again)
    weight = "encode1.conv0.weight"
    to_seed = (seed.state_dict()[weight] - baseline.state_dict()[weight]).abs().max()
    to_perturbed = (perturbed.state_dict()[weight] - baseline.state_dict()[weight]).abs().max()
    assert 0 < to_perturbed < to_seed


def test_training_goes_on_from_given_weights(heads, tmp_path):
    torch.manual_seed(1)
    start = Vinn(TINY, n_classes_of("coronal"))
    trained = train(heads, tmp_path / "coronal.pkl", 1, start=start, lr=0.0, lr_end=0.0, weight_decay=0.0)
    name = "encode1.conv0.weight"
    assert torch.equal(trained.state_dict()[name], start.state_dict()[name])


def test_another_recipe_is_refused(heads, tmp_path):
    train(heads, tmp_path / "coronal.pkl", 1)
    with pytest.raises(UserError, match="trained by another recipe"):
        train(heads, tmp_path / "coronal.pkl", 1, lr=0.5)


def test_pairs_are_read_on_fastsurfers_grid(tmp_path):
    shape = (60, 64, 62)
    labels = np.zeros(shape, np.int16)
    labels[10:50, 10:50, 10:50], labels[20:40, 20:40, 20:40] = 2022, 2
    image = (labels % 1000 * 4 + 50 * (labels > 0)).astype(np.int16)
    for name, data in (("sub-01_desc-dkt_dseg", labels), ("sub-01_T1w", image)):
        nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / f"{name}.nii.gz")
    (head,) = load_heads([tmp_path / "sub-01_desc-dkt_dseg.nii.gz"], recipe_of(1, "sagittal"))
    assert head.image.shape == head.classes.shape == head.weights.shape == (256, 256, 256)
    assert np.bincount(head.classes.ravel()).tolist()[5] == 20**3  # white matter
    assert np.unique(head.image[head.classes == 5]).size == 1
    assert head.scale == 1.0


def test_synthetic_heads_have_the_parcels_of_their_label_map(tmp_path):
    labels = np.zeros((60, 64, 62), np.int16)
    labels[10:50, 10:50, 10:50] = 516  # bone
    labels[15:30, 15:45, 15:45], labels[30:45, 15:45, 15:45] = 1003, 2003
    labels[20:30, 20:40, 20:40], labels[30:40, 20:40, 20:40] = 2, 41
    nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / "sub-01_dseg.nii.gz")
    heads = SyntheticHeads([tmp_path / "sub-01_dseg.nii.gz"], parcel_scheme(), recipe_of(1))
    (head,), (again,), (other,) = heads.draw(0, 0), heads.draw(0, 0), heads.draw(0, 1)
    assert head.image.dtype == np.uint8 and head.image.shape == head.classes.shape == (256, 256, 256)
    found = [NETWORK_IDS[k] for k in np.flatnonzero(np.bincount(head.classes.ravel()) > 1000)]
    assert found == [0, 2, 41, 1003]  # the sides share this parcel, and bone has no class
    white = np.argwhere(head.classes == found.index(2)), np.argwhere(head.classes == NETWORK_IDS.index(41))
    assert white[0].mean(0)[0] > white[1].mean(0)[0] + 5  # left is high in LIA
    assert np.array_equal(head.image, again.image) and not np.array_equal(head.classes, other.classes)


def test_scheme_of_parcels_has_every_class_and_mirrors():
    scheme = parcel_scheme()
    ids = network_ids(np.array(scheme.target_ids)[None, None])
    assert set(NETWORK_IDS) <= set(ids.ravel().tolist())
    mirror = dict(zip(scheme.ids.tolist(), scheme.ids[scheme.mirror].tolist(), strict=True))
    assert mirror[1035] == 2035 and mirror[2002] == 1002 and mirror[2] == 41
    assert all(mirror[mirror[i]] == i for i in mirror)


def test_the_command_needs_a_plane_and_what_it_can_learn(tmp_path, capsys):
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.int16), np.eye(4)), tmp_path / "sub-01_dseg.nii.gz")
    command = [str(tmp_path), str(tmp_path / "out"), "--architecture", "fastsurfer-vinn", "--members", "ieee"]
    assert main(command) == 64
    assert "needs --plane" in capsys.readouterr().err
    assert main([*command, "--plane", "axial"]) == 65
    err = capsys.readouterr().err
    assert "training on images drawn from them" in err and "label(s) [1] are not in the label table" in err
    other = nib.Nifti1Image(np.full((8, 8, 8), 2, np.int16), np.eye(4))
    for name in ("sub-02_dseg", "sub-02_T1w"):
        nib.save(other, tmp_path / f"{name}.nii.gz")
    assert main([*command, "--plane", "axial"]) == 65
    assert "sub-01_dseg.nii.gz: no *_T1w.nii.gz beside it" in capsys.readouterr().err
