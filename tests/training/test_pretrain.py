"""Pre-training: exact targets, the same bits after an interruption, features of all members in the same coordinates."""

import nibabel as nib
import numpy as np
import pytest
import torch

from bids_varaug.cli.pretrain import main
from bids_varaug.errors import UserError
from bids_varaug.models.encoders import load_encoder, load_encoders
from bids_varaug.models.ensemble import load_ensemble
from bids_varaug.models.unet import load_member
from bids_varaug.training import pretrain
from bids_varaug.training.pretrain import Pretrainer, PretrainRecipe, contrast_loss, log_volumes
from bids_varaug.training.recipe import plan_member

SIDE = 32  # the least that SFCN takes


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"SHAPE": (SIDE,) * 3, "N_SCALE": 4, "N_TESTS": 8}.items():
        monkeypatch.setattr(pretrain, name, value)
    monkeypatch.setattr(pretrain.BrainGenerator, "displacement", 4.0)  # as the window is small


@pytest.fixture
def make_trainer(tmp_path, scheme, subject):
    def make(folder="e", objective="volumes", steps=3, batch=2, **options):
        recipe = PretrainRecipe("sfcn", objective, steps=steps, batch=batch)
        return Pretrainer(tmp_path / folder, recipe, scheme, [subject], "cpu", **options)

    return make


class KilledError(Exception):
    pass


@pytest.mark.parametrize("objective", ["volumes", "contrast"])
@pytest.mark.parametrize("member", ["ieee", "mca01"])
def test_killed_and_resumed_gives_the_bits_of_an_unbroken_run(make_trainer, member, objective):
    """Also the running statistics of its normalisations, which no gradient moves."""
    plan = plan_member(member)

    def kill(member, report):
        if report.step == 1:
            raise KilledError

    unbroken = make_trainer("a", objective).train_member(plan).state_dict()
    with pytest.raises(KilledError):
        make_trainer("b", objective, on_step=kill, save_every=1).train_member(plan)
    resumed = make_trainer("b", objective).train_member(plan).state_dict()
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[name], value) for name, value in unbroken.items())


def test_members_of_a_rounding_see_the_images_of_the_baseline(make_trainer, scheme, subject):
    trainer = make_trainer()
    scale = pretrain.volume_scale(trainer.generator, [subject], scheme)
    seen = {m: trainer._draw(trainer.generator, plan_member(m), 1, scale) for m in ("ieee", "mca01", "seed01")}
    assert torch.equal(seen["mca01"][0], seen["ieee"][0]) and torch.equal(seen["mca01"][1], seen["ieee"][1])
    assert not torch.equal(seen["seed01"][0], seen["ieee"][0])
    weights = [trainer.train_member(plan_member(m)).head.weight for m in ("ieee", "mca01")]
    assert not torch.equal(*weights)


def test_targets_are_the_volumes_of_the_label_map():
    targets = torch.zeros((4, 4, 4), dtype=torch.uint8)
    targets[0, 0] = 2
    assert log_volumes(targets, 4).tolist() == pytest.approx([np.log(8), np.log(8 * 5), np.log(8)])


def test_images_of_a_pair_show_one_anatomy_in_two_contrasts(make_trainer, subject):
    trainer = make_trainer()
    images, targets = trainer.generator.draw_contrasts(subject, (SIDE,) * 3, 2.0, 5, 2)
    assert torch.equal(targets, trainer.generator.draw_targets(subject, (SIDE,) * 3, 2.0, 5))
    inside = targets > 0
    assert abs(np.corrcoef(images[0][inside], images[1][inside])[0, 1]) < 0.95
    assert ((images[0] > 0.02) & inside).sum() > 0.9 * inside.sum()


def test_contrast_loss_is_that_of_the_definition():
    z = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 2.0], [0.0, 1.0]])
    alike = np.array([[1, 0.6, 0, 0], [0.6, 1, 0.8, 0.8], [0, 0.8, 1, 1], [0, 0.8, 1, 1]]) / 0.1
    partner, terms = [1, 0, 3, 2], []
    for i, j in enumerate(partner):
        others = [k for k in range(4) if k != i]
        terms.append(np.log(np.exp(alike[i, others]).sum()) - alike[i, j])
    assert float(contrast_loss(z)) == pytest.approx(np.mean(terms), rel=1e-5)


def test_volumes_of_unseen_images_are_learnt(make_trainer, subject):
    def score(steps):
        trainer = make_trainer(f"{steps}", steps=steps, batch=4)  # batch normalisation learns little from two
        ensemble = trainer.compare_members(trainer.train_encoders("e", ["ieee"]), [subject])
        return ensemble.training["comparison"]["members"]["ieee"]["volumes_r2"]

    assert score(1) < 0 and score(80) > 0.1


def test_features_of_members_are_brought_to_those_of_the_baseline(make_trainer, subject):
    trainer = make_trainer(steps=30)
    ensemble = trainer.compare_members(trainer.train_encoders("e", ["ieee", "seed01"]), [subject])
    ieee, seed = (load_encoder(ensemble, member) for member in ensemble.members)
    image = trainer.generator.draw_contrasts(subject, (SIDE,) * 3, 2.0, 123, 1)[0][None]
    with torch.inference_mode():
        wanted, found, apart = ieee.features(image), seed.features(image), seed.body(image)
        assert torch.equal(wanted, ieee.body(image))
    assert (found - wanted).norm() < 0.7 * (apart - wanted).norm()
    before = {path: path.read_bytes() for path in trainer.directory.glob("*.*")}
    trainer.compare_members(load_encoders(trainer.directory), [subject])
    assert before == {path: path.read_bytes() for path in trainer.directory.glob("*.*")}
    # Killed between the alignment and the manifest, with a member more
    more = trainer.train_encoders("e", ["ieee", "seed01", "seed02"])
    assert not more.is_aligned
    (trainer.directory / "alignment.safetensors").write_bytes(b"of the killed run")
    assert trainer.compare_members(more, [subject]).is_aligned


def test_members_of_another_recipe_are_refused(make_trainer):
    make_trainer().train_encoders("e", ["ieee"])
    with pytest.raises(UserError, match=r"manifest\.json: its members were trained by another recipe"):
        make_trainer(steps=4).train_encoders("e", ["seed01"])


@pytest.fixture
def labels_dir(tmp_path, scheme, subject):
    """Two label maps of the boxes."""
    folder = tmp_path / "labels"
    folder.mkdir()
    ids = scheme.ids[subject.classes.numpy()]
    for n in range(2):
        nib.save(nib.Nifti1Image(ids.astype(np.int16), np.eye(4)), folder / f"sub-{n}_dseg.nii.gz")
    return folder


def test_command_trains_and_compares(labels_dir, tmp_path, capsys):
    command = [str(labels_dir), str(tmp_path / "out"), "--steps", "2", "--batch-size", "2", "--hold-out", "1"]
    assert main([*command, "--members", "ieee,mca01"]) == 0
    assert "mca01: volumes_r2" in capsys.readouterr().err
    ensemble = load_encoders(tmp_path / "out")
    assert [member.id for member in ensemble.members] == ["ieee", "mca01"]
    assert "Left-Hippocampus" in ensemble.outputs and "background" not in ensemble.outputs
    assert ensemble.training["n_label_maps"] == 1
    assert main([str(labels_dir), str(tmp_path / "out"), "--hold-out", "2"]) != 0
    assert "--hold-out 2 leaves none to train on" in capsys.readouterr().err


def test_command_takes_the_encoder_of_the_segmentation(labels_dir, tmp_path, subject):
    """Its features are means of what the segmenting network computes itself."""
    command = [str(labels_dir), str(tmp_path / "out"), "--objective", "segmentation-encoder", "--hold-out", "1"]
    assert main([*command, "--members", "ieee,seed01"]) == 0
    ensemble, aseg31 = load_encoders(tmp_path / "out"), load_ensemble("aseg31")
    network = load_member(aseg31, aseg31.baseline)
    image = torch.rand(1, 1, SIDE, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    means = []
    for block in network.encoder:
        block.register_forward_hook(lambda block, inputs, output: means.append(output.mean(dim=(2, 3, 4))))
    with torch.inference_mode():
        network.coarse_logits(image)
        found = load_encoder(ensemble, ensemble.members[0]).features(image)
    assert torch.allclose(found, torch.cat(means, dim=1), atol=1e-3)
