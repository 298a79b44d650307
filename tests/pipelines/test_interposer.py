"""The noise in libm: what it moves, by how much, and that a seed repeats it."""

import os
import subprocess
import sys

import numpy as np
import pytest

from bids_varaug.pipelines import interposer
from bids_varaug.pipelines.interposer import (
    InterposerError,
    check_program,
    compile_interposer,
    count_calls,
    libm_calls,
    noise_environment,
    read_stats,
)
from tests.pipelines.conftest import build


def run(program, library, folder, seed, **options):
    out, stats = folder / "out.txt", folder / "stats"
    stats.unlink(missing_ok=True)
    environment = os.environ | (noise_environment(library, seed, stats, **options) if library else {})
    subprocess.run([program, str(out)], env=environment, check=True)
    return out.read_text(), read_stats(stats)


def values(text):
    lines = [line.split() for line in text.splitlines()[4:] if len(line.split()) == 2 and line[:5] != "child"]
    return np.array([[float.fromhex(a), float.fromhex(b)] for a, b in lines])


def test_a_seed_repeats_the_noise_of_all_threads_and_another_one_does_not(program, library, tmp_path):
    first, stats = run(program, library, tmp_path, 1)
    assert run(program, library, tmp_path, 1)[0] == first
    assert run(program, library, tmp_path, 2)[0] != first
    plain, none = run(program, None, tmp_path, 0)
    assert first != plain and none == {}
    assert stats["exp"][0] == 3 * 999 + 2 and stats["cosf"][0] == 3 * 999  # the child of fork too
    assert len(set(first.splitlines()[1:4])) == 3  # three threads of the same work, each with its own noise


def test_results_move_by_one_ulp_as_often_as_said(program, library, tmp_path):
    plain = values(run(program, None, tmp_path, 0)[0])
    noisy = np.array([values(run(program, library, tmp_path, seed)[0]) for seed in range(1, 4)])
    for column, kind in ((0, (np.float64, np.int64)), (1, (np.float32, np.int32))):
        bits = [array[..., column].astype(kind[0]).view(kind[1]).astype(np.int64) for array in (plain, noisy)]
        steps = bits[1] - bits[0]
        assert set(np.unique(steps)) == {-1, 0, 1}
        # 6000 draws; each bound is 4.5 standard deviations away: a false alarm in 100,000
        assert abs((steps == 0).mean() - 0.5) < 4.5 * 0.5 / np.sqrt(6000)
        assert abs(steps.mean()) < 4.5 * np.sqrt(0.5 / 6000)


def test_zero_infinite_and_at_wish_whole_numbers_are_left_alone(program, library, tmp_path):
    special = [run(program, library, tmp_path, seed, spare_integers=True)[0].splitlines()[0] for seed in range(5)]
    assert set(special) == {"0x1p+3 0x0p+0 inf"}
    eights = {run(program, library, tmp_path, seed)[0].split()[0] for seed in range(12)}
    assert len(eights) > 1


def test_precision_sets_the_size_of_the_noise(program, library, tmp_path):
    plain = values(run(program, None, tmp_path, 0)[0])
    noisy = values(run(program, library, tmp_path, 1, precision=20)[0])
    relative = np.abs(noisy / plain - 1)
    assert 2.0**-21 < relative.max() < 2.0**-19
    assert (relative > 0).mean() > 0.9


def test_what_a_program_asks_of_libm_is_known_before(program):
    assert {"exp", "cosf", "pow", "log", "expf", "sin"} <= set(libm_calls(program))
    assert libm_calls(check_program("true")) == []


def test_programs_that_cannot_be_reached_are_refused(library, tmp_path, monkeypatch):
    with pytest.raises(InterposerError, match="no such program"):
        check_program("no-such-program")
    with pytest.raises(InterposerError, match="statically"):
        check_program(str(build(tmp_path, "-static")))
    setuid = build(tmp_path)
    setuid.chmod(0o4755)
    with pytest.raises(InterposerError, match="setuid"):
        check_program(str(setuid))
    text = tmp_path / "text"
    text.write_text("neither")
    text.chmod(0o755)
    with pytest.raises(InterposerError, match="neither a script"):
        check_program(str(text))
    monkeypatch.setattr(interposer.shutil, "which", lambda name: None)
    with pytest.raises(InterposerError, match="C compiler"):
        compile_interposer(tmp_path / "other")
    assert compile_interposer(library.parent) == library  # made before, it needs none


def test_a_broken_compiler_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "false")
    with pytest.raises(InterposerError, match="cannot compile"):
        compile_interposer(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_our_own_networks_are_not_reached(library, tmp_path):
    """torch computes with vector code of its own: libm's noise is none for it."""
    code = (
        "import hashlib, torch; torch.manual_seed(0); torch.set_num_threads(1)\n"
        "from bids_varaug.models.ensemble import NetworkShape\n"
        "from bids_varaug.models.unet import build_network\n"
        "network = build_network(NetworkShape(4, (8, 16), 8)).eval()\n"
        "with torch.no_grad(): y = network(torch.randn(1, 1, 32, 32, 32)).softmax(1)\n"
        "print(hashlib.sha256(y.numpy().tobytes()).hexdigest())"
    )
    stats = tmp_path / "stats"
    results = []
    for seed in (None, 1, 2):
        noise = {} if seed is None else noise_environment(library, seed, stats, spare_integers=True)
        environment = os.environ | noise
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        results.append(done.stdout)
    assert len(set(results)) == 1
    assert count_calls(read_stats(stats))[0] > 0
