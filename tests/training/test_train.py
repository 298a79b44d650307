"""The loop: an interrupted run gives the bits of an unbroken one; members differ as they should."""

import json
import resource
import signal
from dataclasses import replace

import pytest
import torch

from bids_varaug.errors import OutputError, UsageError, UserError
from bids_varaug.models.ensemble import NetworkShape, load_ensemble
from bids_varaug.models.unet import build_network
from bids_varaug.training.optimiser import segmentation_loss, training_loss
from bids_varaug.training.recipe import Recipe, Stage, Window, parse_members, plan_member
from bids_varaug.training.synthesis import SyntheticImageGenerator
from bids_varaug.training.train import Trainer

TINY = (Window(0.5, 2.0, (16, 16, 16)), Window(0.5, 4.0, (16, 16, 16)))


@pytest.fixture
def recipe(scheme):
    # The first stage leaves the rim alone, whose weights have no moments in its checkpoints.
    body = Stage("body", 2, TINY, 1e-2, 1e-2, bf16=False, balanced=True, body_only=True)
    whole = Stage("whole", 3, TINY, 1e-2, 0.0, bf16=False)
    return Recipe(NetworkShape(len(scheme.target_ids), (4, 4), 4), (body, whole))


@pytest.fixture
def generator(scheme, recipe):
    return SyntheticImageGenerator(scheme, recipe.synthesis)


@pytest.fixture
def make_trainer(tmp_path, scheme, subject, recipe):
    def make(recipe=recipe, folder="e", **options):
        return Trainer(tmp_path / folder, recipe, scheme, [subject], "cpu", **options)

    return make


@pytest.fixture
def checkpoint(tmp_path):
    """Of the baseline, as trained in the folder "e"."""
    path = tmp_path / "e" / "checkpoints" / "ieee.safetensors"
    path.parent.mkdir(parents=True)
    return path


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


class KilledError(Exception):
    pass


@pytest.mark.parametrize("killed_at", [1, 3])
@pytest.mark.parametrize("member", ["ieee", "mca01", "seed02"])
def test_killed_and_resumed_gives_the_bits_of_an_unbroken_run(make_trainer, member, killed_at):
    plan = plan_member(member)

    def kill(member, report, network):
        if report.step == killed_at:
            raise KilledError

    unbroken = make_trainer(folder="a").train_member(plan)
    with pytest.raises(KilledError):
        make_trainer(folder="b", on_step=kill, save_every=1).train_member(plan)
    assert same_weights(make_trainer(folder="b").train_member(plan), unbroken)


def test_ensemble_is_written_and_its_members_differ(make_trainer, tmp_path):
    seen = []
    trainer = make_trainer(on_step=lambda name, report, network: seen.append((name, report.step)))
    trainer.train_ensemble("tiny", ["ieee", "mca01", "seed01"])
    ensemble = load_ensemble(str(tmp_path / "e"))
    assert [m.id for m in ensemble.members] == ["ieee", "mca01", "seed01"]
    assert [m.precision for m in ensemble.members] == [None, 24, None]
    assert len({m.sha256 for m in ensemble.members}) == 3
    assert {(m.steps, m.format) for m in ensemble.members} == {(5, "float16")}
    assert ensemble.training["arithmetic"] | {"mca": 0} == {
        "convolution_bits": 24, "other_bits": 24, "mca": 0,
    }  # fmt: skip
    assert len(seen) == 3 * 5
    json.dumps(ensemble.training)


def test_training_again_finds_everything_done(make_trainer):
    first, again = [], []
    ensembles = [
        make_trainer(on_step=lambda *report, seen=seen: seen.append(report)).train_ensemble(
            "tiny", ["ieee"]
        )
        for seen in (first, again)
    ]
    assert ensembles[0].members == ensembles[1].members
    assert len(first) == 5 and again == []


def test_loss_falls(generator, subject, recipe):
    network = build_network(recipe.network, 0)
    image, target = generator.draw(subject, (32, 32, 32), 2.0, 0)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = training_loss(network, image, target, 0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_loss_is_that_of_the_whole_volume_on_average(generator, subject, recipe):
    network = build_network(recipe.network, 0)
    image, target = generator.draw(subject, (32, 32, 32), 2.0, 0)
    with torch.no_grad():
        logits = network(image[None, None])[0].flatten(1).T
        whole = float(segmentation_loss(logits, target.reshape(-1).long()))
        sampled = [float(training_loss(network, image, target, phase)) for phase in range(4)]
    assert sum(sampled) / 4 == pytest.approx(whole, rel=0.01)
    assert len(set(sampled)) == 4


def test_perfect_logits_have_hardly_any_loss():
    target = torch.arange(4).repeat(50)
    assert float(segmentation_loss(40.0 * torch.eye(4)[target], target)) < 1e-4


def test_infinite_loss_stops_and_keeps_the_checkpoint(make_trainer, checkpoint, monkeypatch):
    def broken(shape, seed):
        network = build_network(shape, seed)
        with torch.no_grad():
            network.body_head.bias.fill_(float("nan"))
        return network

    monkeypatch.setattr("bids_varaug.training.train.build_network", broken)
    with pytest.raises(UserError, match="at step 0 of stage body"):
        make_trainer().train_member(plan_member("ieee"))
    assert not checkpoint.exists()


def test_full_disk_keeps_the_last_checkpoint(make_trainer, checkpoint):
    """A limit on the size of files stands for the full disk: the write breaks off in the middle."""

    def narrow(member, report, network):
        if report.step == 2:
            limit = checkpoint.stat().st_size // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OutputError, match=r"ieee\.safetensors: could not be written"):
            make_trainer(on_step=narrow, save_every=1).train_member(plan_member("ieee"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p for p in checkpoint.parent.iterdir() if p.suffix != ".lock"] == [checkpoint]
    steps = []
    make_trainer(on_step=lambda member, report, network: steps.append(report.step)).train_member(
        plan_member("ieee")
    )
    assert steps == [2, 3, 4]


def test_damaged_checkpoint_is_named(make_trainer, checkpoint):
    checkpoint.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"ieee\.safetensors: damaged checkpoint"):
        make_trainer().train_member(plan_member("ieee"))


def test_the_baseline_trained_twice_has_the_same_bits(make_trainer):
    first, second = (
        make_trainer(folder=name).train_ensemble("tiny", ["ieee"]).members for name in "ab"
    )
    assert first == second


def test_members_of_another_recipe_are_not_mixed(make_trainer, recipe):
    make_trainer().train_ensemble("tiny", ["ieee"])
    with pytest.raises(UserError, match="by another recipe"):
        make_trainer(replace(recipe, clip=2.0)).train_ensemble("tiny", ["mca01"])


def test_members_of_another_arithmetic_are_not_mixed(make_trainer, recipe, monkeypatch):
    """As where only some of the processors have bfloat16."""
    half = replace(recipe, stages=(replace(recipe.stages[0], bf16=True), recipe.stages[1]))
    monkeypatch.setattr("bids_varaug.training.train.has_bfloat16", lambda device: False)
    make_trainer(half).train_ensemble("tiny", ["ieee"])
    monkeypatch.setattr("bids_varaug.training.train.has_bfloat16", lambda device: True)
    with pytest.raises(UserError, match="other number formats"):
        make_trainer(half).train_ensemble("tiny", ["mca01"])


@pytest.mark.parametrize(
    ("steps", "clip", "seed"), [(9, 1.0, 0), (3, 2.0, 0), (3, 1.0, 1)]
)  # fmt: skip
def test_a_checkpoint_of_another_recipe_or_seed_is_refused_and_kept(
    make_trainer, checkpoint, recipe, steps, clip, seed
):
    make_trainer().train_member(plan_member("ieee"))
    before = checkpoint.read_bytes()
    body, whole = recipe.stages
    other = replace(recipe, stages=(body, replace(whole, steps=steps)), clip=clip)
    plan = replace(plan_member("ieee"), seed=seed)
    with pytest.raises(UserError, match=r"ieee\.safetensors: checkpoint of another recipe"):
        make_trainer(other).train_member(plan)
    assert checkpoint.read_bytes() == before


def test_members_trained_by_several_processes_all_reach_the_manifest(make_trainer, tmp_path):
    for member in ("seed01", "ieee", "mca01"):  # each starts without knowing of the others
        make_trainer().train_ensemble("tiny", [member])
    assert [m.id for m in load_ensemble(str(tmp_path / "e")).members] == [
        "ieee", "mca01", "seed01",
    ]  # fmt: skip


def test_learning_rate_falls_linearly_after_the_warm_up(recipe):
    stage = Stage("s", 101, TINY, 1.0, 0.0, bf16=False)
    assert recipe.learning_rate(stage, 50, 1000) == pytest.approx(0.5)
    assert recipe.learning_rate(stage, 0, 0) == pytest.approx(1 / min(recipe.warmup, 25))


def test_windows_are_drawn_by_their_shares():
    stage = Stage("s", 1, TINY, 1.0, 0.0, bf16=False)
    assert stage.choose_window(0.49) == TINY[0]
    assert stage.choose_window(0.5) == TINY[1]


@pytest.mark.parametrize(("has", "bits"), [(True, 8), (False, 24)])
def test_precision_is_that_of_the_coarsest_layers(make_trainer, recipe, monkeypatch, has, bits):
    monkeypatch.setattr("bids_varaug.training.train.has_bfloat16", lambda device: has)
    stages = (*recipe.stages, Stage("half", 1, TINY, 1e-2, 0.0, bf16=True))
    mixed = replace(recipe, stages=stages)
    trainer = make_trainer(mixed)
    assert trainer.digits == [24, 24, bits]


def test_monte_carlo_members_share_the_seed_of_the_baseline():
    assert plan_member("mca03").seed == plan_member("ieee").seed
    assert plan_member("mca03").rounding_seed != plan_member("mca04").rounding_seed
    assert plan_member("seed03").seed != plan_member("ieee").seed


def test_members_are_trained_in_the_order_given():
    text = "ieee,seed01,mca01,seed02..seed03,mca02"
    assert parse_members(text) == ("ieee", "seed01", "mca01", "seed02", "seed03", "mca02")


@pytest.mark.parametrize("text", ["mca", "mca01..seed02", "mca05..mca01", "ieee..ieee", "x01"])
def test_impossible_member_lists_are_refused(text):
    with pytest.raises(UsageError, match="--members"):
        parse_members(text)


def test_perturbed_members_see_the_images_of_the_baseline(make_trainer, monkeypatch):
    drawn = []

    class Recorder(SyntheticImageGenerator):
        def draw(self, *arguments):
            drawn[-1].append(super().draw(*arguments))
            return drawn[-1][-1]

    monkeypatch.setattr("bids_varaug.training.train.SyntheticImageGenerator", Recorder)
    for member in ("ieee", "mca01"):
        drawn.append([])
        make_trainer().train_member(plan_member(member))
    baseline, perturbed = drawn
    assert len(baseline) == 5
    for ours, theirs in zip(baseline, perturbed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
