"""Checkpoints of FastSurfer are read as data; whatever else is in them is refused."""

import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bids_varaug.cli.convert import main
from bids_varaug.errors import EnsembleError, UsageError
from bids_varaug.models.checkpoint import convert, find_planes, read_checkpoint
from bids_varaug.models.ensemble import PLANES, VinnShape, load_ensemble, sha256_of
from bids_varaug.models.fastsurfer import build_planes, load_planes

NAME = "aparc_vinn_{}_v2.0.0.pkl"


@pytest.fixture(scope="module")
def states():
    return {plane: network.state_dict() for plane, network in build_planes(VinnShape(), seed=1).items()}


@pytest.fixture(scope="module")
def checkpoints(states, tmp_path_factory):
    """A checkpoint of each plane, with all that FastSurfer's training saves."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for plane, state in states.items():
        others = {"optimizer_state": {"state": {}}, "epoch": 30, "best_metric": np.float64(0.5), "config": "MODEL: 1\n"}
        torch.save({"model_state": state, **others}, folder / NAME.format(plane))
    return folder


def change(source, target, old, new):
    """Copy a checkpoint with another text, of any length, in its pickle."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
        for item in before.infolist():
            data = before.read(item)
            after.writestr(item, data.replace(old, new) if item.filename.endswith("data.pkl") else data)
    return target


def test_a_checkpoint_of_fastsurfer_gives_its_weights(golden, tmp_path):
    state = read_checkpoint(golden / "checkpoint_sagittal.pkl", "sagittal")
    wanted = load_file(golden / "weights_sagittal.safetensors")
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
    old = change(golden / "checkpoint_sagittal.pkl", tmp_path / "sagittal.pkl", b"numpy._core", b"numpy.core")
    assert torch.equal(read_checkpoint(old, "sagittal")["classifier.conv.bias"], wanted["classifier.conv.bias"])


def test_converted_networks_are_those_of_the_checkpoints(checkpoints, states, tmp_path):
    convert({"ieee": [checkpoints], "mca01": [checkpoints]}, tmp_path / "fs")
    ensemble = load_ensemble(str(tmp_path / "fs"))
    assert [member.id for member in ensemble.members] == ["ieee", "mca01"]
    assert ensemble.is_fastsurfer
    sources = ensemble.training["sources"]["ieee"]
    assert sources["axial"]["SHA256"] == sha256_of(checkpoints / NAME.format("axial"))
    networks = load_planes(ensemble, ensemble.members[0])
    assert list(networks) == list(PLANES)
    for plane in ("coronal", "axial"):
        found = networks[plane].state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in states[plane].items())
    assert networks["sagittal"].classifier.conv.weight.shape[0] == 79


def test_bare_weights_are_taken_too(states, tmp_path):
    path = tmp_path / "coronal.pt"
    torch.save({f"module.{name}": tensor for name, tensor in states["coronal"].items()}, path)
    assert read_checkpoint(path, "coronal").keys() == states["coronal"].keys()


class Hostile:
    """Runs a command wherever it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_code_is_refused_by_name_and_not_executed(states, tmp_path):
    path, mark = tmp_path / "coronal.pkl", tmp_path / "executed"
    torch.save({"model_state": states["coronal"], "config": Hostile(mark)}, path)
    with pytest.raises(EnsembleError, match=r"coronal.pkl: this file names code \(posix.system\)"):
        read_checkpoint(path, "coronal")
    assert not mark.exists()


def test_code_under_the_name_of_a_number_is_refused(checkpoints, tmp_path):
    source = checkpoints / NAME.format("coronal")
    path = change(source, tmp_path / "coronal.pkl", b"cnumpy\ndtype", b"cnumpy\nloadtxt")
    with pytest.raises(EnsembleError, match=r"names code \(numpy.loadtxt\)"):
        read_checkpoint(path, "coronal")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files_are_refused(checkpoints, tmp_path, share):
    whole = (checkpoints / NAME.format("coronal")).read_bytes()
    path = tmp_path / "coronal.pkl"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(EnsembleError, match="coronal.pkl: no checkpoint, or a truncated one"):
        read_checkpoint(path, "coronal")


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], {"model_state": {"conv.weight": torch.zeros(2)}}])
def test_other_networks_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "axial.pkl")
    with pytest.raises(EnsembleError, match="not a network of FastSurferVINN"):
        read_checkpoint(tmp_path / "axial.pkl", "axial")


def test_other_sizes_and_failed_trainings_are_refused(states, tmp_path):
    path = tmp_path / "axial.pkl"
    for change_of, said in ((lambda t: t[:32].clone(), "other shapes"), (lambda t: t * np.nan, "NaN or infinite")):
        name = "bottleneck.conv1.weight"
        torch.save(states["axial"] | {name: change_of(states["axial"][name])}, path)
        with pytest.raises(EnsembleError, match=said):
            read_checkpoint(path, "axial")


def test_the_wrong_plane_is_refused(checkpoints, tmp_path):
    for plane, other, n in (("coronal", "sagittal", 51), ("sagittal", "axial", 79)):
        path = tmp_path / NAME.format(plane)
        shutil.copy(checkpoints / NAME.format(other), path)
        with pytest.raises(EnsembleError, match=f"a network of {n} classes, but the {plane} one has"):
            read_checkpoint(path, plane)


@pytest.mark.parametrize(
    ("names", "said"),
    [(["coronal.pkl", "axial.pkl"], "no checkpoint of the sagittal plane"),
     (["a_coronal.pkl", "b_coronal.pkl"], "is coronal too"),
     (["best.pkl"], "says no plane"), (["axial_coronal.pkl"], "says coronal and axial")],
)  # fmt: skip
def test_each_plane_must_be_there_once(tmp_path, names, said):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=said):
        find_planes([tmp_path])


def test_the_command_converts_and_says_what_is_wrong(checkpoints, tmp_path, capsys):
    files = [str(checkpoints / NAME.format(plane)) for plane in PLANES]
    out = str(tmp_path / "fs")
    assert main(["fastsurfer", *files, out, "--member", f"seed01={checkpoints}", "--name", "labs"]) == 0
    ensemble = load_ensemble(out)
    assert (ensemble.name, [m.family for m in ensemble.members]) == ("labs", ["ieee", "seed"])
    assert main(["fastsurfer", *files, out]) == 64
    assert "not empty" in capsys.readouterr().err
    assert main(["fastsurfer", str(tmp_path / "other"), "--member", f"best={checkpoints}"]) == 64
    assert main(["fastsurfer", str(tmp_path / "other")]) == 64
    assert not (tmp_path / "other").exists()
