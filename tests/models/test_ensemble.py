"""Ensembles on disk: what is written is read; what is damaged is refused with a reason."""

import json
from dataclasses import replace

import pytest
import torch

from bids_varaug.errors import EnsembleError, UsageError
from bids_varaug.models.ensemble import (
    DiceModel,
    Ensemble,
    Label,
    Member,
    NetworkShape,
    Quality,
    find_ensemble,
    load_ensemble,
    round_inference,
    select_members,
    write_manifest,
)
from bids_varaug.models.unet import build_network, load_member, save_weights

SHAPE = NetworkShape(3, (2, 2), 2)
IDS = ("ieee", "mca01", "mca02", "seed01", "seed02")


@pytest.fixture
def ensemble(tmp_path):
    members = []
    for number, name in enumerate(IDS):
        checksum = save_weights(build_network(SHAPE, number), tmp_path / f"{name}.safetensors")
        family = name.rstrip("0123456789")
        members.append(Member(name, family, number, None, f"{name}.safetensors", checksum))
    labels = (Label(0, "Background", "#000000"), Label(2, "A", "#ff0000"), Label(41, "B", "#00f"))
    made = Ensemble("tiny", "1", tmp_path, 1.0, labels, SHAPE, tuple(members), {"steps": 0})
    write_manifest(made)
    return made


def test_what_is_written_is_read(ensemble):
    assert load_ensemble(str(ensemble.directory)) == ensemble


def test_weights_come_back_as_half_precision_rounded_them(ensemble):
    network = load_member(ensemble, ensemble.members[1])
    expected = build_network(SHAPE, 1).body_head.weight.half().float()
    assert torch.equal(network.body_head.weight, expected)
    assert not network.training


def test_weights_are_readable_by_others(ensemble):
    assert (ensemble.directory / "ieee.safetensors").stat().st_mode & 0o044 == 0o044


def ids(members):
    return [member.id for member in members]


@pytest.mark.parametrize(
    ("wanted", "n", "expected"),
    [
        (["all"], None, list(IDS)),
        (["mca"], None, ["mca01", "mca02"]),
        (["ieee", "seed02"], None, ["ieee", "seed02"]),
        (["all"], 1, ["ieee", "mca01", "seed01"]),
    ],
)
def test_members_are_chosen_by_family_id_and_number(ensemble, wanted, n, expected):
    assert ids(select_members(ensemble, wanted, n)) == expected


def test_unknown_member_is_refused_with_the_known_ones(ensemble):
    with pytest.raises(EnsembleError, match=r"mca09.*It has ieee, mca01"):
        select_members(ensemble, ["mca09"])


def test_rounded_members_are_the_baseline_with_seeds_of_their_own(ensemble):
    members = round_inference(ensemble, 99, random_seed=7)
    assert ids(members)[:2] == ["rr01", "rr02"] and ids(members)[-1] == "rr99"
    assert len({member.seed for member in members}) == 99
    assert {(m.family, m.precision, m.sha256, m.file) for m in members} == {
        ("rr", 24, ensemble.members[0].sha256, "ieee.safetensors")
    }
    assert not any(member.is_baseline for member in members)


def test_rounded_members_keep_their_seeds_when_more_are_asked_for(ensemble):
    assert round_inference(ensemble, 5, 3)[:2] == round_inference(ensemble, 2, 3)


def test_another_random_seed_gives_every_rounded_member_another_seed(ensemble):
    seeds = [{m.seed for m in round_inference(ensemble, 99, seed)} for seed in (0, 1, 2**32 - 1)]
    assert len(set.union(*seeds)) == 3 * 99


def test_no_rounded_member_unless_asked_for(ensemble):
    assert round_inference(ensemble, 0, 1) == ()
    assert round_inference(replace(ensemble, members=ensemble.members[1:]), 0, 1) == ()


def test_rounded_members_need_a_baseline(ensemble):
    with pytest.raises(UsageError, match=r"--perturb-inference 2: .*no baseline \(ieee\)"):
        round_inference(replace(ensemble, members=ensemble.members[1:]), 2, 0)


def test_rounded_members_asked_for_by_name_are_told_where_they_come_from(ensemble):
    with pytest.raises(EnsembleError, match="come from --perturb-inference"):
        select_members(ensemble, ["rr"])


def test_trained_members_may_not_be_of_the_rounded_family(ensemble):
    other = replace(ensemble.members[1], id="rr01", family="rr")
    write_manifest(replace(ensemble, members=(*ensemble.members, other)))
    with pytest.raises(EnsembleError, match="family rr"):
        load_ensemble(str(ensemble.directory))


def test_unknown_ensemble_is_refused():
    with pytest.raises(EnsembleError, match="nosuch: neither a shipped ensemble"):
        load_ensemble("nosuch")


def test_changed_weights_are_refused(ensemble):
    path = ensemble.directory / "ieee.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(EnsembleError, match=r"ieee\.safetensors: checksum differs"):
        load_member(ensemble, ensemble.members[0])


def test_missing_weights_are_refused(ensemble):
    (ensemble.directory / "ieee.safetensors").unlink()
    with pytest.raises(EnsembleError, match="weights of ieee are missing"):
        load_member(ensemble, ensemble.members[0])


@pytest.mark.parametrize(("key", "value"), [("steps", 7), ("format", "float32")])
def test_members_of_unequal_treatment_are_refused(ensemble, key, value):
    equal = tuple(replace(member, steps=8, format="float16") for member in ensemble.members)
    write_manifest(replace(ensemble, members=equal))
    assert load_ensemble(str(ensemble.directory)).members == equal
    unequal = (*equal[:-1], replace(equal[-1], **{key: value}))
    write_manifest(replace(ensemble, members=unequal))
    with pytest.raises(EnsembleError, match=rf"manifest\.json: .*unequal .*seed02 {value}"):
        load_ensemble(str(ensemble.directory))


def test_weights_of_another_network_are_refused(ensemble):
    manifest = ensemble.directory / "manifest.json"
    values = json.loads(manifest.read_text())
    values["network"]["rim_channels"] = 4
    manifest.write_text(json.dumps(values))
    other = load_ensemble(str(ensemble.directory))
    with pytest.raises(EnsembleError, match="do not fit the manifest's network"):
        load_member(other, other.members[0])


@pytest.mark.parametrize("temperature", [0, -1, float("nan"), float("inf")])
def test_impossible_temperature_is_refused(ensemble, temperature):
    write_manifest(replace(ensemble, temperature=temperature))
    with pytest.raises(EnsembleError, match="damaged manifest .temperature"):
        load_ensemble(str(ensemble.directory))


@pytest.mark.parametrize("change", [{"trunk": {"file": "trunk.safetensors", "sha256": ""}}, {"base": "ieee"}])
def test_ensemble_with_a_trunk_is_refused_with_a_way_out(ensemble, change):
    manifest = ensemble.directory / "manifest.json"
    values = json.loads(manifest.read_text())
    (values if "trunk" in change else values["members"][1]).update(change)
    manifest.write_text(json.dumps(values))
    with pytest.raises(EnsembleError, match="earlier version, whose members share a trunk.*bids_varaug-train"):
        load_ensemble(str(ensemble.directory))


def test_manifest_of_members_trained_apart_by_an_earlier_trainer_is_read(ensemble):
    manifest = ensemble.directory / "manifest.json"
    values = json.loads(manifest.read_text())
    members = [member | {"base": None} for member in values["members"]]
    manifest.write_text(json.dumps(values | {"trunk": None, "members": members}))
    assert load_ensemble(str(ensemble.directory)) == ensemble


MODEL = DiceModel(0.1, 0.9, 0.2, 0.01, -0.5, 0.5)


def test_calibration_of_the_expected_dice_is_read_as_written(ensemble):
    calibrated = replace(ensemble, quality=Quality(MODEL, replace(MODEL, pair_dice=0.0), 0.9, ("head",)))
    write_manifest(calibrated)
    assert load_ensemble(str(ensemble.directory)) == calibrated


@pytest.mark.parametrize(
    "damage", [{"coverage": 90}, {"alone": None}, {"several": {"intercept": 1}}, {"heads": None}, {"other": 1},
               {"several": vars(MODEL) | {"low": float("nan")}}, {"several": vars(MODEL) | {"low": 0.6}},
               {"several": vars(MODEL) | {"intercept": "1"}}],
)  # fmt: skip
def test_damaged_calibration_of_the_expected_dice_is_refused(ensemble, damage):
    write_manifest(replace(ensemble, quality=Quality(MODEL, MODEL, 0.9, ("head",))))
    path = ensemble.directory / "manifest.json"
    values = json.loads(path.read_text())
    values["quality"] |= damage
    path.write_text(json.dumps(values))
    with pytest.raises(EnsembleError, match=r"manifest\.json: damaged manifest"):
        load_ensemble(str(ensemble.directory))


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 99}'])
def test_damaged_manifest_is_refused(ensemble, text):
    (ensemble.directory / "manifest.json").write_text(text)
    with pytest.raises(EnsembleError, match=r"manifest\.json"):
        load_ensemble(str(ensemble.directory))


def test_folder_below_the_current_one_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert find_ensemble("mine") == tmp_path / "mine"
