"""BABS itself, with ``examples/babs.yaml`` and a real Slurm, from ``babs init`` to ``babs merge``.

A stand-in for ``singularity`` runs the installed app instead of an image, with the same arguments.
With ``BIDS_VARAUG_SIF=IMAGE.sif``, where ``singularity`` is installed, the image itself runs, with
the ensemble in it, on ``BIDS_VARAUG_HEADS=BIDS_DIR``, a copy of some real heads.
"""

import os
import pwd
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from bids_varaug.cli.run import main
from tests.platforms.conftest import IDENTITY
from tests.slurm.test_slurm import await_that
from tests.workflows.conftest import describe, head, write_t1w
from tests.workflows.test_participant import digests

NAME = "bids-varaug-0-1-0"
SIF = os.environ.get("BIDS_VARAUG_SIF")
OPTIONS = ("--sloppy", "--n-members", "1")
STAND_IN = """\
#!/bin/bash
# singularity run OPTIONS IMAGE ARGUMENTS, without singularity: the app that is installed here.
set -e
while [ "$1" != containers/.datalad/environments/bids-varaug-0-1-0/image ]; do shift; done
test -s "$1"
shift
exec {program} "$@"
"""


@pytest.fixture
def babs(cluster, tmp_path):
    """Run a command of BABS, DataLad or Slurm that must succeed; returns what it printed."""
    for program in ("babs", "datalad", "git-annex", "7z"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} (pip install -r .ci/tools.txt; apt-get install p7zip-full)")
    programs = tmp_path / "bin"
    programs.mkdir()
    if SIF is None:
        stand_in = programs / "singularity"
        stand_in.write_text(STAND_IN.format(program=Path(sys.executable).parent / "bids_varaug"))
        stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    # The `python` beside BABS: it imports DataLad.
    path = os.pathsep.join((str(programs), str(Path(shutil.which("babs")).parent), cluster["PATH"]))
    own = IDENTITY | {"PATH": path, "HOME": str(tmp_path)}
    # BABS asks for the jobs of LOGNAME, which the app sets for itself in the process of the tests.
    own |= dict.fromkeys(("LOGNAME", "USER"), pwd.getpwuid(os.geteuid()).pw_name)
    # Jobs do not get the environment of `babs submit`.
    (tmp_path / "preamble").write_text("".join(f"export {k}='{v}'\n" for k, v in own.items()))
    environment = cluster | own

    def call(*command: str | Path) -> str:
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout

    return call


@pytest.fixture
def heads(tmp_path) -> Path:
    """A dataset of two participants, one of whom has two sessions."""
    if SIF is not None:
        return Path(shutil.copytree(os.environ["BIDS_VARAUG_HEADS"], tmp_path / "bids"))
    bids_dir = describe(tmp_path / "bids")
    write_t1w(bids_dir, "sub-01_ses-a", head(1))
    write_t1w(bids_dir, "sub-01_ses-b", head(2))
    write_t1w(bids_dir, "sub-02_ses-a", head(3))
    return bids_dir


def configuration(root: Path, bids_dir: Path, ensemble: Path, folder: Path) -> Path:
    """Write the example with its lines to be filled in filled in, and smaller."""
    text = (root / "examples" / "babs.yaml").read_text()
    config = yaml.safe_load(text)
    config["input_datasets"]["BIDS"]["origin_url"] = str(bids_dir)
    config["cluster_resources"]["customized_text"] = "#SBATCH --cpus-per-task=1\n#SBATCH --mem=8G\n"
    config["script_preamble"] = f". {folder}/preamble"
    config["job_compute_space"] = str(folder / "scratch")
    config["bids_app_args"] |= {"--sloppy": "", "--n-members": "1", "--nprocs": "1"}
    if SIF is None:
        config["bids_app_args"]["--ensemble"] = str(ensemble)
    path = folder / "babs.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def results_of(folder: Path) -> dict[str, str]:
    """Digests of images and tables; pages name the input folder, files at the root the image."""
    return {path: digest for path, digest in digests(folder).items() if path.startswith("sub-")
            and not path.endswith(".html")}  # fmt: skip


def test_each_participant_is_a_job_and_merged_they_are_what_one_run_gives(
    babs, heads, root, small_ensemble, linear, tmp_path
):
    (tmp_path / "scratch").mkdir()
    image = Path(shutil.copy(SIF, tmp_path)) if SIF else tmp_path / "image.sif"
    if not SIF:
        image.write_text("a stand-in for an image\n")
    for dataset in (heads.name, "containers"):
        babs("datalad", "create", "--force", dataset)
        babs("datalad", "save", "-d", dataset, "-m", "all of it")
    babs("datalad", "containers-add", "-d", "containers", NAME, "--url", image)

    project = tmp_path / "project"
    babs(
        "babs", "init", "--container_ds", tmp_path / "containers", "--container_name", NAME,
        "--container_config", configuration(root, heads, small_ensemble, tmp_path),
        "--processing_level", "subject", "--queue", "slurm", project,
    )  # fmt: skip
    babs("babs", "check-setup", project, "--job-test")
    babs("babs", "submit", project)
    await_that(lambda: not babs("squeue", "--noheader"), "the jobs do not end")
    logs = "".join(path.read_text() for path in project.glob("analysis/logs/*.e*"))
    n = len(list(heads.glob("sub-*")))
    assert f"{n} job(s) successfully finished" in babs("babs", "status", project), logs
    babs("babs", "merge", project)

    results = tmp_path / "results"
    babs("datalad", "clone", f"ria+file://{project}/output_ria#~data", results)
    babs("datalad", "get", "-d", results, results)
    archives = sorted(results.glob("*.zip"))
    assert [path.name for path in archives] == [
        f"{path.name}_bids_varaug-0-1-0.zip" for path in sorted(heads.glob("sub-*"))
    ]
    merged = tmp_path / "merged" / "bids_varaug"
    for archive in archives:
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(merged.parent)

    plain = tmp_path / "plain"
    ensemble = [] if SIF else ["--ensemble", str(small_ensemble)]
    assert main([str(heads), str(plain), "participant", "-w", str(tmp_path / "work"),
                 "--skip-bids-validation", *OPTIONS, *ensemble, *linear]) == 0  # fmt: skip
    assert results_of(merged) == results_of(plain)
    assert digests(merged).keys() == digests(plain).keys()
