"""Sparse clones as input, and an output directory that is a dataset: with git-annex itself."""

import hashlib
import json
import re
import subprocess
from pathlib import Path

import pytest

from bids_varaug.cli.run import main
from tests.workflows.conftest import describe, head, write_t1w

SCANS = ("sub-01_ses-a", "sub-01_ses-b", "sub-02", "sub-03")


@pytest.fixture(scope="module")
def dataset(datalad, tmp_path_factory) -> Path:
    """Three participants, one with two sessions; git-annex holds every file."""
    bids_dir = describe(tmp_path_factory.mktemp("datalad") / "bids")
    for number, prefix in enumerate(SCANS):
        image = write_t1w(bids_dir, prefix, head(number))
        image.with_name(f"{prefix}_T1w.json").write_text('{"Manufacturer": "None"}')
    labels = sorted({prefix[:6] for prefix in SCANS})
    (bids_dir / "participants.tsv").write_text("\n".join(["participant_id", *labels, ""]))
    datalad("datalad", "create", "--force", ".", cwd=bids_dir)
    datalad("datalad", "save", "-m", "images", cwd=bids_dir)
    return bids_dir


@pytest.fixture
def sparse(datalad, dataset, tmp_path) -> Path:
    """A clone of which only one session of sub-01 was fetched."""
    datalad("datalad", "clone", str(dataset), "sparse", cwd=tmp_path)
    datalad("datalad", "get", "sub-01/ses-a", cwd=tmp_path / "sparse")
    return tmp_path / "sparse"


@pytest.fixture
def app(small_ensemble, linear, tmp_path):
    """Run the participant level, with the validator, in a work directory of its own."""

    def run(bids_dir: Path, *options: str, work: str = "work") -> int:
        return main([str(bids_dir), str(tmp_path / "out"), "participant", "-w",
                     str(tmp_path / work), "--ensemble", str(small_ensemble), *linear,
                     *options])  # fmt: skip

    return run


def test_printed_command_fetches_what_a_sparse_clone_lacks(app, sparse, capsys):
    assert app(sparse, "--dry-run") == 1
    told = capsys.readouterr()
    assert "skipped, only a link is here" in told.err
    (command,) = re.findall("^  (cd .* && datalad get .*)$", told.err, re.MULTILINE)
    subprocess.run(command, shell=True, check=True, capture_output=True)
    app(sparse, "--dry-run")
    told = capsys.readouterr()
    assert told.out.startswith("4 T1w image(s)")
    assert "skipped" not in told.err


def test_participant_that_was_not_fetched_ends_with_66(app, sparse, capsys):
    assert app(sparse, "--participant-label", "02") == 66
    assert "datalad get sub-02/anat/sub-02_T1w.nii.gz" in capsys.readouterr().err


def test_group_level_says_how_to_fetch_the_participants(sparse, tmp_path, capsys):
    assert main([str(sparse), str(tmp_path / "out"), "group", "-w", str(tmp_path / "work")]) == 66
    assert capsys.readouterr().err.rstrip().endswith("datalad get participants.tsv")


def test_filter_file_leaves_the_session_that_was_fetched(app, sparse, tmp_path, capsys):
    filters = tmp_path / "filters.json"  # as BABS writes it, which knows other images too
    t1w = {"datatype": "anat", "session": "a", "suffix": "T1w"}
    filters.write_text(json.dumps({"fmap": {"datatype": "fmap"}, "t1w": t1w}))
    wanted = ("--participant-label", "01", "--bids-filter-file", str(filters))
    assert app(sparse, *wanted, "--dry-run") == 0
    told = capsys.readouterr()
    listed = [line for line in told.out.splitlines() if line.startswith("  ")]
    assert listed == ["  sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz"]
    assert "skipped" not in told.err


def test_output_dataset_can_be_written_again(app, datalad, sparse, tmp_path):
    out = tmp_path / "out"
    # The others were not fetched: they are told, and the one that is here is done.
    assert app(sparse, "--n-members", "1", work="first") == 1
    datalad("datalad", "create", "--force", str(out), cwd=tmp_path)
    datalad("datalad", "save", "-m", "first run", cwd=out)
    objects = _sums(out / ".git/annex/objects")
    first = _results(out)
    assert all((out / name).is_symlink() for name in first)

    again = ("--n-members", "1", "--participant-label", "01")
    assert app(sparse, *again, work="second") == 1  # ses-b is not here
    assert _results(out) == first
    assert not any((out / name).is_symlink() for name in first if "/anat/" in name)

    datalad("datalad", "save", "-m", "the same again", cwd=out)
    saved = datalad("git", "diff", "--name-only", "HEAD~1", cwd=out).split()
    assert all(name.startswith("logs/") for name in saved)
    assert app(sparse, "--members", "ieee", work="third") == 1
    changed = _results(out)
    assert {name.partition("_stat-")[2].partition("_")[0] for name in changed if "_stat-" in name} == {"totalentropy"}
    assert [name for name in changed if changed[name] != first[name]]
    assert objects.items() <= _sums(out / ".git/annex/objects").items()
    datalad("git", "annex", "fsck", "--all", "--quiet", cwd=out)
    datalad("datalad", "save", "-m", "baseline alone", cwd=out)


def _results(out: Path) -> dict[str, str]:
    """Checksums of the results, the logs left out: they name each run's own work directory."""
    sums = _sums(out)
    return {name: sum for name, sum in sums.items() if not name.startswith(("logs/", "."))}


def _sums(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
