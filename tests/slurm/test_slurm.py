"""On a real slurmctld and slurmd: killed in the middle, submitted again, same bits as a plain run.

By default there are three participants, two for the plugin; with BIDS_VARAUG_SLURM_FULL=1 there are six, and SLURMGraph
is tried too (minutes).
"""

import re
import subprocess
import time
from pathlib import Path

import pytest

from bids_varaug.models.ensemble import load_ensemble
from bids_varaug.models.unet import load_member
from bids_varaug.settings import Settings
from tests.slurm.conftest import FULL, LABELS, MEMBERS
from tests.workflows.test_participant import digests
from tests.workflows.test_plugins import fail, give, kill_own_worker, run

PATIENCE = 600


def await_that(condition, what: str):
    """Return what `condition` gives as soon as that is true."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return value


@pytest.fixture
def slurm(cluster, tmp_path):
    def call(*command: str) -> str:
        answer = subprocess.run(command, env=cluster, cwd=tmp_path, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout.strip()

    return call


@pytest.fixture
def submit(app, root, slurm, tmp_path):
    """Submit the example's job array as its user does, for less than it asks for."""
    (tmp_path / "logs").mkdir()
    script = str(root / "examples" / "slurm" / "participants.sbatch")

    def call(tasks: str) -> str:
        return slurm(
            "sbatch", "--parsable", f"--array={tasks}", "--cpus-per-task=1", "--mem=4G", script,
            str(app.bids_dir), "out", "work", "--ensemble", str(app.ensemble), *MEMBERS,
        )  # fmt: skip

    return call


def outputs_of(out: Path, labels) -> dict[str, str]:
    """Digests of the root's files and of these participants'."""
    return {
        path: digest for path, digest in digests(out).items()
        if not path.startswith("sub-") or path[4:6] in labels
    }  # fmt: skip


def test_array_with_a_task_killed_and_submitted_again(submit, plain, slurm, tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    beyond = len(LABELS) + 1
    job = submit(f"1-{beyond}")
    first = await_that(lambda: list(work.glob("*/sub_03/**/seed01.safetensors")), "no member")
    slurm("scancel", "--signal=KILL", "--full", f"{job}_3")
    done_at = first[0].stat().st_mtime_ns
    await_that(lambda: not slurm("squeue", "--noheader"), "the array does not end")
    assert sorted(path.stem[4:] for path in out.glob("sub-*.html")) == [*LABELS[:2], *LABELS[3:]]
    # A task without a participant is refused.
    log = tmp_path / "logs" / f"bids_varaug-{job}_{beyond}.log"
    assert f"ERROR: --array: no task {beyond}" in log.read_text()

    again = submit("3")
    await_that(lambda: not slurm("squeue", "--noheader"), "the task does not end")
    assert digests(out) == digests(plain)
    assert first[0].stat().st_mtime_ns == done_at, "what was done was done again"
    assert "sub-03: task 3" in (tmp_path / "logs" / f"bids_varaug-{again}_3.log").read_text()
    assert list(tmp_path.rglob(".sub-*.lock")) == []


def test_training_array_brings_its_members_together(slurm, labels_dir, root, tmp_path):
    """Two tasks start at once; each adds its own member."""
    (tmp_path / "logs").mkdir()
    script = str(root / "examples" / "slurm" / "train.sbatch")
    slurm(
        "sbatch", "--array=0-1", "--cpus-per-task=1", "--mem=4G", script, str(labels_dir), "mine",
        "--members", "ieee,seed01",
        "--steps", "0", "coarse=1",
        "--channels", "4", "4", "4", "4", "4", "--device", "cpu",
    )  # fmt: skip
    await_that(lambda: not slurm("squeue", "--noheader"), "the array does not end")
    ensemble = load_ensemble(str(tmp_path / "mine"))
    assert [member.id for member in ensemble.members] == ["ieee", "seed01"]
    for member in ensemble.members:
        load_member(ensemble, member)


def test_killed_step_fails_and_the_others_go_on(cluster, slurm, tmp_path, monkeypatch):
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOGNAME", raising=False)  # as in a container
    arguments = {"sbatch_args": "--time=5", "poll_seconds": 0.5, "result_seconds": 2}
    settings = Settings(
        tmp_path / "in", tmp_path / "out", "participant", tmp_path / "work",
        plugin={"plugin": "SLURM", "plugin_args": arguments},
    )  # fmt: skip
    complete, progress, root = run(settings, bad=fail, killed=kill_own_worker, good=give)
    assert not complete and progress.failed == {"bad", "killed"}
    assert (root / "good" / "result_good.pklz").exists()
    jobs = slurm("scontrol", "show", "job", "--oneliner")
    assert re.search(r"JobName=good\.flow\.bids_varaug .*TimeLimit=00:05:00 .*mem=205M", jobs), jobs


@pytest.fixture
def with_plugin(app, cluster, tmp_path):
    """Start the app with a plugin, as a process of its own, on some participants."""

    def start(plugin: str, labels) -> subprocess.Popen:
        given = tmp_path / "plugin.yml"
        given.write_text(
            f"plugin: {plugin}\nplugin_args:\n  sbatch_args: --cpus-per-task=1\n"
            "  poll_seconds: 0.5\n  result_seconds: 2\n"
        )
        command = app.arguments(
            tmp_path / "out", *MEMBERS, "--use-plugin", str(given), "--participant-label", *labels
        )
        # As in a container, where nobody set it.
        environment = {name: value for name, value in cluster.items() if name != "LOGNAME"}
        return subprocess.Popen(
            ["bids_varaug", *command], env=environment, stderr=subprocess.PIPE, text=True
        )

    return start


def test_plugin_with_a_step_killed_and_started_again(with_plugin, plain, slurm, tmp_path):
    labels = LABELS if FULL else LABELS[1:3]
    process = with_plugin("SLURM", labels)

    def fuse_of_03() -> list[str]:
        assert process.poll() is None, process.communicate()[1]
        return re.findall(r"(\d+) fuse\.sub_03", slurm("squeue", "-h", "-o", "%i %j"))

    slurm("scancel", "--signal=KILL", "--full", await_that(fuse_of_03, "no step to kill")[0])
    error = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 1, error
    assert "sub-03: fuse failed" in error and "not finished: sub-03" in error
    assert {path.stem[4:] for path in (tmp_path / "out").glob("sub-*.html")} == {*labels} - {"03"}

    process = with_plugin("SLURM", labels)
    error = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, error
    assert outputs_of(tmp_path / "out", LABELS) == outputs_of(plain, labels)
    memory = slurm("scontrol", "show", "job", "--oneliner")
    assert re.search(r"JobName=report_sub_03\S* .*mem=1G", memory), memory


@pytest.mark.skipif(not FULL, reason="minutes: BIDS_VARAUG_SLURM_FULL=1")
def test_no_job_outlives_the_process_that_watches(with_plugin, slurm):
    process = with_plugin("SLURM", ("05",))
    await_that(lambda: slurm("squeue", "-h"), "no job")
    process.terminate()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 143, error
    await_that(lambda: not slurm("squeue", "-h"), "a job goes on")


@pytest.mark.skipif(not FULL, reason="minutes: BIDS_VARAUG_SLURM_FULL=1")
def test_graph_plugin_submits_and_ends(with_plugin, plain, slurm, tmp_path):
    process = with_plugin("SLURMGraph", ("05",))
    error = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0 and "Submitted." in error
    await_that(lambda: not slurm("squeue", "--noheader"), "the jobs do not end")
    assert outputs_of(tmp_path / "out", LABELS) == outputs_of(plain, ("05",))
