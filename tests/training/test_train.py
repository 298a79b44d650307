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
from bids_varaug.training.loss import segmentation_loss, training_loss
from bids_varaug.training.members import Workshop, parse_members, plan_member, train_ensemble
from bids_varaug.training.recipe import Recipe, Stage, Window
from bids_varaug.training.synthesis import Randomiser
from bids_varaug.training.train import choose_window, learning_rate, train

TINY = (Window(0.5, 2.0, (16, 16, 16)), Window(0.5, 4.0, (16, 16, 16)))


@pytest.fixture
def recipe(scheme):
    # The first stage leaves the rim alone, whose weights have no moments in its checkpoints.
    body = Stage("body", 2, TINY, 1e-2, 1e-2, bf16=False, balanced=True, body_only=True)
    whole = Stage("whole", 3, TINY, 1e-2, 0.0, bf16=False)
    return Recipe(NetworkShape(len(scheme.target_ids), (4, 4), 4), (body, whole))


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_at", [1, 3])
@pytest.mark.parametrize("member", ["ieee", "mca01", "seed02"])
def test_killed_and_resumed_gives_the_bits_of_an_unbroken_run(
    tmp_path, scheme, head, recipe, member, killed_at
):
    plan = plan_member(member)
    randomiser = Randomiser(scheme, recipe.synthesis)

    def run(name, on_step=lambda report: None):
        return train(build_network(recipe.network, 0), [head], randomiser, recipe,
                     plan.seed, tmp_path / name, plan.arithmetic, on_step, 1)  # fmt: skip

    def kill(report):
        if report.step == killed_at:
            raise Killed

    unbroken = run("a.safetensors")
    with pytest.raises(Killed):
        run("b.safetensors", kill)
    assert same_weights(run("b.safetensors"), unbroken)


def test_ensemble_is_written_and_its_members_differ(tmp_path, scheme, head, recipe):
    seen = []
    workshop = Workshop(
        tmp_path / "e", recipe, scheme, [head], "cpu",
        lambda name, report, network: seen.append((name, report.step)),
    )  # fmt: skip
    train_ensemble(workshop, "tiny", ["ieee", "mca01", "seed01"])
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


def test_training_again_finds_everything_done(tmp_path, scheme, head, recipe):
    def train_it(seen):
        workshop = Workshop(
            tmp_path / "e", recipe, scheme, [head], "cpu",
            lambda name, report, network: seen.append(name),
        )  # fmt: skip
        return train_ensemble(workshop, "tiny", ["ieee"])

    first, again = [], []
    assert train_it(first).members == train_it(again).members
    assert again == []


def test_loss_falls(scheme, head, recipe):
    network = build_network(recipe.network, 0)
    randomiser = Randomiser(scheme, recipe.synthesis)
    image, target = randomiser.draw(head, (32, 32, 32), 2.0, 0)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = training_loss(network, image, target, 0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_loss_is_that_of_the_whole_volume_on_average(scheme, head, recipe):
    network = build_network(recipe.network, 0)
    randomiser = Randomiser(scheme, recipe.synthesis)
    image, target = randomiser.draw(head, (32, 32, 32), 2.0, 0)
    with torch.no_grad():
        logits = network(image[None, None])[0].flatten(1).T
        whole = float(segmentation_loss(logits, target.reshape(-1).long()))
        sampled = [float(training_loss(network, image, target, phase)) for phase in range(4)]
    assert sum(sampled) / 4 == pytest.approx(whole, rel=0.01)
    assert len(set(sampled)) == 4


def test_perfect_logits_have_hardly_any_loss():
    target = torch.arange(4).repeat(50)
    assert float(segmentation_loss(40.0 * torch.eye(4)[target], target)) < 1e-4


def test_infinite_loss_stops_with_the_step_and_keeps_the_checkpoint(tmp_path, scheme, head, recipe):
    network = build_network(recipe.network, 0)
    with torch.no_grad():
        network.body_head.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="at step 0 of stage body"):
        train(network, [head], Randomiser(scheme, recipe.synthesis), recipe, 0,
              tmp_path / "c.safetensors")  # fmt: skip
    assert not (tmp_path / "c.safetensors").exists()


def test_full_disk_keeps_the_last_checkpoint(tmp_path, scheme, head, recipe):
    """A limit on the size of files stands for the full disk: the write breaks off in the middle."""
    path = tmp_path / "c.safetensors"
    network = build_network(recipe.network, 0)

    def run():
        train(network, [head], Randomiser(scheme, recipe.synthesis), recipe, 0,
              path, save_every=1, on_step=narrow)  # fmt: skip

    def narrow(report):
        if report.step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OutputError, match=r"c\.safetensors: could not be written"):
            run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]
    steps = []
    train(build_network(recipe.network, 0), [head], Randomiser(scheme, recipe.synthesis), recipe,
          0, path, on_step=lambda report: steps.append(report.step))  # fmt: skip
    assert steps == [2, 3, 4]


def test_damaged_checkpoint_is_named(tmp_path, scheme, head, recipe):
    path = tmp_path / "c.safetensors"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"c\.safetensors: damaged checkpoint"):
        train(build_network(recipe.network, 0), [head], Randomiser(scheme, recipe.synthesis),
              recipe, 0, path)  # fmt: skip


@pytest.fixture
def make_workshop(tmp_path, scheme, head, recipe):
    def make(recipe=recipe, folder="e"):
        return Workshop(tmp_path / folder, recipe, scheme, [head], "cpu", lambda *report: None)

    return make


def test_the_baseline_trained_twice_has_the_same_bits(make_workshop):
    first, second = (
        train_ensemble(make_workshop(folder=name), "tiny", ["ieee"]).members for name in "ab"
    )
    assert first == second


def test_members_of_another_recipe_are_not_mixed(make_workshop, recipe):
    train_ensemble(make_workshop(), "tiny", ["ieee"])
    with pytest.raises(UserError, match="by another recipe"):
        train_ensemble(make_workshop(replace(recipe, clip=2.0)), "tiny", ["mca01"])


def test_members_of_another_arithmetic_are_not_mixed(make_workshop, recipe, monkeypatch):
    """As where only some of the processors have bfloat16."""
    half = replace(recipe, stages=(replace(recipe.stages[0], bf16=True), recipe.stages[1]))
    monkeypatch.setattr("bids_varaug.training.train.has_bfloat16", lambda device: False)
    train_ensemble(make_workshop(half), "tiny", ["ieee"])
    monkeypatch.setattr("bids_varaug.training.train.has_bfloat16", lambda device: True)
    with pytest.raises(UserError, match="other number formats"):
        train_ensemble(make_workshop(half), "tiny", ["mca01"])


@pytest.mark.parametrize(
    ("steps", "clip", "seed"), [(9, 1.0, 0), (3, 2.0, 0), (3, 1.0, 1)]
)  # fmt: skip
def test_a_checkpoint_of_another_recipe_or_seed_is_refused_and_kept(
    tmp_path, scheme, head, recipe, steps, clip, seed
):
    path = tmp_path / "c.safetensors"

    def run(recipe, seed):
        train(build_network(recipe.network, 0), [head], Randomiser(scheme, recipe.synthesis),
              recipe, seed, path)  # fmt: skip

    run(recipe, 0)
    before = path.read_bytes()
    body, whole = recipe.stages
    other = replace(recipe, stages=(body, replace(whole, steps=steps)), clip=clip)
    with pytest.raises(UserError, match=r"c\.safetensors: checkpoint of another recipe"):
        run(other, seed)
    assert path.read_bytes() == before


def test_members_trained_by_several_processes_all_reach_the_manifest(make_workshop, tmp_path):
    for member in ("seed01", "ieee", "mca01"):  # each starts without knowing of the others
        train_ensemble(make_workshop(), "tiny", [member])
    assert [m.id for m in load_ensemble(str(tmp_path / "e")).members] == [
        "ieee", "mca01", "seed01",
    ]  # fmt: skip


def test_learning_rate_falls_linearly_after_the_warm_up(recipe):
    stage = Stage("s", 101, TINY, 1.0, 0.0, bf16=False)
    assert learning_rate(recipe, stage, 50, 1000) == pytest.approx(0.5)
    assert learning_rate(recipe, stage, 0, 0) == pytest.approx(1 / min(recipe.warmup, 25))


def test_windows_are_drawn_by_their_shares():
    stage = Stage("s", 1, TINY, 1.0, 0.0, bf16=False)
    assert choose_window(stage, 0.49) == TINY[0]
    assert choose_window(stage, 0.5) == TINY[1]


@pytest.mark.parametrize(("has", "bits"), [(True, 8), (False, 24)])
def test_precision_is_that_of_the_coarsest_layers(tmp_path, scheme, recipe, monkeypatch, has, bits):
    monkeypatch.setattr("bids_varaug.training.train.has_bfloat16", lambda device: has)
    stages = (*recipe.stages, Stage("half", 1, TINY, 1e-2, 0.0, bf16=True))
    mixed = replace(recipe, stages=stages)
    workshop = Workshop(tmp_path, mixed, scheme, [], "cpu", lambda *report: None)
    assert workshop.precision == bits
    assert replace(workshop, recipe=recipe).precision == 24


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


def test_perturbed_members_see_the_images_of_the_baseline(tmp_path, scheme, head, recipe):
    drawn = {}

    class Recorder(Randomiser):
        def draw(self, *arguments):
            image, target = super().draw(*arguments)
            drawn[member].append((image, target))
            return image, target

    for member in ("ieee", "mca01"):
        drawn[member] = []
        plan = plan_member(member)
        recorder = Recorder(scheme, recipe.synthesis)
        train(build_network(recipe.network, 0), [head], recorder, recipe,
              plan.seed, tmp_path / f"{member}.safetensors", plan.arithmetic)  # fmt: skip
    for (image, target), (perturbed, labels) in zip(drawn["ieee"], drawn["mca01"], strict=True):
        assert torch.equal(image, perturbed)
        assert torch.equal(target, labels)
