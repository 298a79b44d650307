"""The participant level from the command line to the files."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_varaug.cli import run as cli_run
from bids_varaug.cli.run import main
from bids_varaug.inputs import validation
from bids_varaug.inputs.freesurfer import read_aseg_stats
from bids_varaug.inputs.validation import run_validator
from tests.workflows.conftest import IDS, Run, describe, head, write_t1w

ROUNDED = ("--members", "ieee", "--perturb-inference", "2", "--random-seed", "7",
           "--participant-label", "02", "--nprocs", "2", "--omp-nthreads", "1")  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every output; the settings of a run name its folders and are left out."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "logs"
    }


@pytest.fixture(scope="module")
def finished(app, linear, tmp_path_factory):
    """Output of a complete run; a test that changes it leaves it as it was."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert app(out, *linear, "--write-members", "--freesurfer-dir", str(out.with_name("fs"))) == 0
    return out


def test_everything_is_written_valid_and_on_the_grid_of_the_t1w(finished, dataset):
    assert run_validator(finished) == []
    for t1w in sorted(dataset.rglob("*_T1w.nii*")):
        stem = t1w.name.split("_T1w")[0]
        folder = finished / t1w.relative_to(dataset).parent
        source = nib.load(t1w)
        images = sorted(folder.glob(f"{stem}_*.nii.gz"))
        # consensus, ieee, 4 members, posterior, 2 masks, 5 maps
        assert len(images) == 14
        for path in images:
            image = nib.load(path)
            assert image.shape[:3] == source.shape
            assert np.array_equal(image.affine, source.affine)
        posterior = nib.load(folder / f"{stem}_seg-varaug_desc-mean_probseg.nii.gz")
        total = np.asarray(posterior.dataobj).sum(-1)
        assert np.abs(total - 1).max() < 0.02
    assert (finished / "sub-01.html").exists() and (finished / "sub-02.html").exists()


def test_each_image_has_a_folder_in_the_subjects_directory(finished, dataset):
    subjects = finished.with_name("fs")
    images = {path.name.split("_T1w")[0]: path for path in dataset.rglob("*_T1w.nii*")}
    assert {path.name for path in subjects.iterdir() if path.is_dir()} == set(images)
    for prefix, t1w in images.items():
        volume = nib.load(subjects / prefix / "mri" / "aseg.varaug.mgz")
        stem = finished / t1w.relative_to(dataset).with_name(prefix)
        labels = nib.load(f"{stem}_seg-varaug_desc-consensus_dseg.nii.gz")
        assert np.array_equal(volume.dataobj, labels.dataobj)
        np.testing.assert_allclose(volume.affine, labels.affine, atol=1e-4)
        regions = pd.read_csv(f"{stem}_seg-varaug_desc-consensus_dseg.tsv", sep="\t", na_values="n/a")
        volumes = read_aseg_stats(subjects / prefix / "stats" / "aseg.stats")
        assert volumes == pytest.approx(regions.set_index("name")["volume_mean"].to_dict(), abs=0.06)


def test_subjects_directory_of_freesurfer_stops_before_anything_is_written(app, tmp_path, capsys):
    stats = tmp_path / "fs" / "sub-01_ses-a" / "stats" / "aseg.stats"
    stats.parent.mkdir(parents=True)
    stats.write_text("# generating_program mri_segstats\n")
    assert app(tmp_path / "out", "--freesurfer-dir", str(tmp_path / "fs")) == 64
    assert "another program made stats/aseg.stats of sub-01_ses-a" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tables_agree_with_each_other(finished):
    folder = finished / "sub-01" / "ses-a" / "anat"
    stem = "sub-01_ses-a_seg-varaug"
    regions = pd.read_csv(folder / f"{stem}_desc-consensus_dseg.tsv", sep="\t", na_values="n/a")
    members = pd.read_csv(folder / f"{stem}_desc-members_morph.tsv", sep="\t", na_values="n/a")
    assert list(members["member"].unique()) == list(IDS)
    perturbed = members[members["family"] != "ieee"].groupby("index")["volume"]
    expected = perturbed.mean().reindex(regions["index"]).to_numpy()
    np.testing.assert_allclose(regions["volume_mean"], expected, rtol=1e-4)
    expected = perturbed.std(ddof=1).reindex(regions["index"]).to_numpy()
    np.testing.assert_allclose(regions["volume_std"], expected, rtol=1e-4, atol=1e-3)


def test_maps_are_those_of_the_members_votes(finished):
    """On the grid of the network (2 mm here, 3 mm native) maps are means: compare where uniform."""
    folder = finished / "sub-02" / "anat"
    stem = "sub-02_acq-las_run-1"
    members = np.stack([
        np.asarray(nib.load(folder / f"{stem}_seg-varaug_desc-{m}_dseg.nii.gz").dataobj)
        for m in IDS[1:]
    ])  # fmt: skip
    path = folder / f"{stem}_seg-varaug_stat-entropy_statmap.nii.gz"
    entropy = np.asarray(nib.load(path).dataobj)
    agreed = (members == members[0]).all(0)
    assert entropy.min() >= 0 and entropy.max() <= 2.0 + 1e-6  # four voters
    assert entropy[~agreed].mean() > entropy[agreed].mean()


def test_sidecars_name_their_source_and_members(finished):
    path = next((finished / "sub-02" / "anat").glob("*_stat-entropy_statmap.json"))
    values = json.loads(path.read_text())
    assert values["Sources"] == ["bids:raw:sub-02/anat/sub-02_acq-las_run-1_T1w.nii.gz"]
    assert values["Units"] == "bit"
    assert values["Members"] == list(IDS[1:])


@pytest.fixture(scope="module")
def resumed(app, tmp_path_factory):
    """A run in workers of two threads, killed and started again: its output, what was done before, and when."""
    out = tmp_path_factory.mktemp("resumed") / "out"
    work = out.with_name("out-work")
    options = ("--participant-label", "02", "--write-members", "--nprocs", "2", "--omp-nthreads", "2")
    command = [sys.executable, "-c", "import sys; from bids_varaug.cli.run import main; "
               "sys.exit(main())", *app.arguments(out, *options)]  # fmt: skip
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(work.rglob("mca01.safetensors")) and time.monotonic() < deadline:
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in work.rglob("ieee.safetensors")}
    assert app(out, *options) == 0
    return out, done


def test_killed_and_resumed_on_two_threads_gives_the_bits_of_one_thread(finished, resumed):
    """The other ran in one go, in this process."""
    alone = {path: digest for path, digest in digests(finished).items() if not path.startswith("sub-01")}
    assert digests(resumed[0]) == alone


def test_member_that_was_done_is_not_done_again(resumed):
    done = resumed[1]
    assert done and all(path.stat().st_mtime_ns == when for path, when in done.items())


def test_bad_subjects_are_named_and_the_others_finish(tmp_path, small_ensemble, linear, capfd):
    bids_dir = describe(tmp_path / "bids")
    write_t1w(bids_dir, "sub-good", head(1))
    truncated = write_t1w(bids_dir, "sub-truncated", head(2))
    truncated.write_bytes(truncated.read_bytes()[:5000])
    write_t1w(bids_dir, "sub-empty").write_bytes(b"")
    write_t1w(bids_dir, "sub-text").write_text("not an image")
    write_t1w(bids_dir, "sub-4d", np.stack([head(3)] * 2, axis=-1))
    holes = head(4)
    holes[10, 10, 10] = np.nan
    write_t1w(bids_dir, "sub-nan", holes)
    write_t1w(bids_dir, "sub-constant", np.full((48, 56, 48), 7.0))
    write_t1w(bids_dir, "sub-tiny", head(5, (12, 12, 12)))
    singular = np.diag([3.0, 3, 3, 1])
    singular[:, 2] = 0
    image = nib.Nifti1Image(head(6).astype(np.float32), np.diag([3.0, 3, 3, 1]))
    image.header["srow_z"] = 0
    image.header["qform_code"] = 0
    path = write_t1w(bids_dir, "sub-singular")
    nib.save(nib.Nifti1Image(image.dataobj, None, image.header), path)
    huge = write_t1w(bids_dir, "sub-huge", extension=".nii")
    content = bytearray(huge.read_bytes())
    content[40:48] = np.array([3, 30000, 30000, 30000], "<i2").tobytes()
    huge.write_bytes(content)
    write_t1w(bids_dir, "sub-half_ses-1", head(7))
    half = write_t1w(bids_dir, "sub-half_ses-2", head(8))
    half.write_bytes(half.read_bytes()[:5000])
    dangling = write_t1w(bids_dir, "sub-dangling")
    dangling.unlink()
    dangling.symlink_to("../../.git/annex/objects/xx/MD5E-s1--0.nii.gz")
    (bids_dir / "sub-none" / "anat").mkdir(parents=True)

    code = Run(bids_dir, small_ensemble)(tmp_path / "out", *linear, "--members", "ieee")
    errors = capfd.readouterr().err
    assert code == 1
    bad = ("truncated", "empty", "text", "4d", "nan", "constant", "tiny", "singular", "huge",
           "dangling")  # fmt: skip
    lines = errors.splitlines()
    assert "split it. To leave the image out, use --bids-filter-file." in errors
    for name in bad:
        named = [line for line in lines if f"sub-{name}_T1w.nii" in line]
        assert any(line.startswith("ERROR: ") for line in named), f"{name} missing:\n{errors}"
        assert not list((tmp_path / "out").rglob(f"sub-{name}_*.nii.gz"))
    assert "sub-none" in errors and "datalad get" in errors
    assert "Traceback" not in errors
    assert (tmp_path / "out" / "sub-good.html").exists()
    report = (tmp_path / "out" / "sub-half.html").read_text()
    assert "sub-half_ses-1" in report and "sub-half_ses-2" not in report
    assert run_validator(tmp_path / "out") == []


def rewrite(path, data, affine=None, **header):
    """Write a T1w image with header fields of our own."""
    image = nib.Nifti1Image(data, np.diag([3.0, 3, 3, 1]) if affine is None else affine)
    for name, value in header.items():
        image.header[name] = value
    nib.save(nib.Nifti1Image(data, None, image.header), path)


def test_odd_images_are_measured_rightly_with_a_warning_or_refused(
    tmp_path, small_ensemble, linear, capfd
):
    bids_dir = describe(tmp_path / "bids")
    plain = np.rint(head(1)).astype(np.int16)
    rewrite(write_t1w(bids_dir, "sub-plain"), plain)
    rewrite(write_t1w(bids_dir, "sub-offset"), (plain + 5000).astype(np.float32) * 1e-9)
    two = {"pixdim": [1, 2.5, 2.5, 2.5, 0, 0, 0, 0], "qform_code": 1, "sform_code": 1}
    rewrite(write_t1w(bids_dir, "sub-twosizes"), plain, **two)
    rewrite(write_t1w(bids_dir, "sub-mirror"), plain, np.diag([-3.0, 3, 3, 1]),
            srow_x=[3, 0, 0, 0], qform_code=1, sform_code=1)  # fmt: skip
    rewrite(write_t1w(bids_dir, "sub-wrapped"), (plain.astype(int) * 55).astype(np.int16))
    rewrite(write_t1w(bids_dir, "sub-metre"), plain, np.diag([3e-3, 3e-3, 3e-3, 1]), xyzt_units=1)
    run = Run(bids_dir, small_ensemble)
    options = [*linear, "--members", "ieee"]
    code = run(tmp_path / "out", *options)
    lines = capfd.readouterr().err.splitlines()
    assert code == 1
    for name, word in (("mirror", "mirror images"), ("wrapped", "wrapped around")):
        assert any(x.startswith("ERROR") and f"sub-{name}_T1w" in x and word in x for x in lines)
        assert not list((tmp_path / "out").rglob(f"sub-{name}_*.nii.gz"))

    def consensus(name):
        return next((tmp_path / "out" / f"sub-{name}").rglob("*desc-consensus_dseg.nii.gz"))

    labels = np.asarray(nib.load(consensus("plain")).dataobj)
    assert labels.any()
    for name in ("offset", "metre"):
        assert np.array_equal(np.asarray(nib.load(consensus(name)).dataobj), labels)
        assert np.allclose(nib.load(consensus(name)).affine, np.diag([3, 3, 3, 1]))
    assert np.allclose(nib.load(consensus("twosizes")).header.get_sform(), np.diag([2.5] * 3 + [1]))
    for name, word in (("twosizes", "contradicts itself"), ("metre", "in metres")):
        sidecar = json.loads(Path(str(consensus(name)).replace(".nii.gz", ".json")).read_text())
        assert any(word in warning for warning in sidecar["Warnings"])
        assert word in (tmp_path / "out" / f"sub-{name}.html").read_text()
        assert any(x.startswith("WARNING") and f"sub-{name}_T1w" in x and word in x for x in lines)
    assert run(tmp_path / "out", *options, "--participant-label", "mirror", "--trust", "qform") == 0
    assert np.linalg.det(nib.load(consensus("mirror")).affine) < 0


def test_baseline_alone_is_the_consensus_without_spread(app, tmp_path, linear, capsys):
    out = tmp_path / "out"
    assert app(out, *linear, "--members", "ieee", "--participant-label", "02") == 0
    folder = out / "sub-02" / "anat"
    consensus, baseline = (
        nib.load(next(folder.glob(f"*_desc-{name}_dseg.nii.gz"))) for name in ("consensus", "ieee")
    )
    assert np.array_equal(np.asarray(consensus.dataobj), np.asarray(baseline.dataobj))
    (entropy,) = folder.glob("*_statmap.nii.gz")
    assert "totalentropy" in entropy.name and nib.load(entropy).get_fdata().max() > 0
    posterior = nib.load(next(folder.glob("*_probseg.nii.gz"))).get_fdata().max(axis=-1)
    unreliable = nib.load(next(folder.glob("*_label-unreliable_mask.nii.gz"))).get_fdata() > 0
    assert np.array_equal(unreliable, np.round(255 * posterior) <= 0.63 * 255) and unreliable.any()
    regions = pd.read_csv(next(folder.glob("*_desc-consensus_dseg.tsv")), sep="\t")
    assert regions["volume_std"].isna().all()
    assert set(regions["verdict"]) <= {"unknown", "unreliable"}
    assert regions["reason"].str.contains("spread unknown with one member").all()
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "structures" in line]
    assert told.startswith("WARNING: /") and "sub-02_acq-las_run-1_T1w.nii.gz: " in told
    assert 'class="answer good"' not in (out / "sub-02.html").read_text()
    assert run_validator(out) == []


@pytest.fixture(scope="module")
def rounded(app, linear, tmp_path_factory):
    """Output of the baseline and two runs of it under random rounding."""
    out = tmp_path_factory.mktemp("rounded") / "out"
    assert app(out, *linear, *ROUNDED, "--write-members") == 0
    return out


def test_rounded_members_are_in_every_table_and_the_report(rounded):
    folder = rounded / "sub-02" / "anat"
    members = pd.read_csv(next(folder.glob("*_morph.tsv")), sep="\t")
    assert list(members["member"].unique()) == ["ieee", "rr01", "rr02"]
    assert list(members["family"].unique()) == ["ieee", "rr"]
    regions = pd.read_csv(next(folder.glob("*_desc-consensus_dseg.tsv")), sep="\t")
    assert regions["volume_std"].notna().all() and (regions["dice_min_rr"] > 0.9).all()
    rows = pd.read_csv(rounded / "descriptions.tsv", sep="\t", index_col="desc_id")
    assert list(rows.loc[["desc-rr01", "desc-rr02"], "family"]) == ["rr", "rr"]
    assert list(rows.loc[["desc-rr01", "desc-rr02"], "seed"]) == [701, 702]
    assert rows.loc["desc-rr01", "sha256"] == rows.loc["desc-ieee", "sha256"]
    sidecar = json.loads(next(folder.glob("*_stat-std_statmap.json")).read_text())
    assert sidecar["Members"] == ["rr01", "rr02"]
    assert len(list(folder.glob("*_desc-rr0?_dseg.nii.gz"))) == 2
    std = nib.load(next(folder.glob("*_stat-std_statmap.nii.gz"))).get_fdata()
    assert 0 < std.max() < 1e-2
    report = (rounded / "sub-02.html").read_text()
    assert "rr02" in report and "under random rounding" in report
    assert run_validator(rounded) == []


def test_rounded_members_have_the_same_bits_in_another_run(rounded, app, tmp_path):
    """Here in worker processes, there in this one."""
    out = tmp_path / "again"
    assert app(out, *ROUNDED, "--write-members") == 0
    assert digests(out) == digests(rounded)


def test_another_random_seed_computes_the_rounded_members_alone_again(rounded, app, linear):
    def times() -> dict[str, int]:
        work = rounded.with_name("out-work")
        found = [p for p in work.rglob("*.safetensors") if p.stem in ("ieee", "rr01", "rr02")]
        return {path.name: path.stat().st_mtime_ns for path in found}

    run = (rounded, *linear, *ROUNDED, "--write-members")
    before, written = times(), digests(rounded)
    assert app(*run, "--random-seed", "8") == 0
    after = times()
    assert {name for name in before if before[name] != after[name]} == {
        "rr01.safetensors",
        "rr02.safetensors",
    }
    assert app(*run) == 0
    assert digests(rounded) == written


def test_another_temperature_changes_probabilities_and_no_label(app, finished, linear, small_ensemble):
    """Calibrated again, in the same work directory: nothing is segmented again."""
    run = (finished, *linear, "--write-members", "--participant-label", "02")
    before = digests(finished)
    members = [path for path in finished.with_name("out-work").rglob("*.safetensors") if path.stem in IDS]
    times = {path: path.stat().st_mtime_ns for path in members}
    manifest = small_ensemble / "manifest.json"
    text = manifest.read_text()
    try:
        manifest.write_text(json.dumps(json.loads(text) | {"temperature": 3.0}))
        assert app(*run) == 0
    finally:
        manifest.write_text(text)
    after = digests(finished)
    changed = {name for name in before if after[name] != before[name]}
    kinds = {name.rpartition("run-1_")[2] for name in changed if name.endswith((".nii.gz", ".tsv"))}
    assert "seg-varaug_desc-mean_probseg.nii.gz" in kinds and kinds <= {
        "seg-varaug_desc-mean_probseg.nii.gz", "label-unreliable_mask.nii.gz", "seg-varaug_desc-consensus_dseg.tsv",
        "seg-varaug_stat-totalentropy_statmap.nii.gz", "seg-varaug_stat-mutualinformation_statmap.nii.gz",
    }  # fmt: skip
    sidecar = next((finished / "sub-02").rglob("*_desc-mean_probseg.json"))
    assert json.loads(sidecar.read_text())["Temperature"] == 3
    assert times and {path: path.stat().st_mtime_ns for path in times} == times
    assert app(*run) == 0
    assert digests(finished) == before


def test_dry_run_shows_rounded_members(app, tmp_path, capsys):
    assert app(tmp_path / "out", "--dry-run", "--n-members", "1", "--perturb-inference", "2") == 0
    assert "members ieee, mca01, seed01, rr01, rr02:" in capsys.readouterr().out


def test_ensemble_without_baseline_cannot_be_rounded(dataset, small_ensemble, tmp_path, capsys):
    folder = tmp_path / "ensemble"
    folder.mkdir()
    values = json.loads((small_ensemble / "manifest.json").read_text())
    values["members"] = [m for m in values["members"] if m["id"] != "ieee"]
    (folder / "manifest.json").write_text(json.dumps(values))
    for member in values["members"]:
        (folder / member["file"]).symlink_to(small_ensemble / member["file"])
    assert Run(dataset, folder)(tmp_path / "out", "--perturb-inference", "2") == 64
    assert "has no baseline (ieee)" in capsys.readouterr().err


def test_sloppy_says_so_everywhere_and_runs_two_members(app, tmp_path, linear):
    out = tmp_path / "out"
    assert app(out, *linear, "--sloppy", "--participant-label", "02") == 0
    members = pd.read_csv(next(out.rglob("*_morph.tsv")), sep="\t")
    assert sorted(members["member"].unique()) == ["ieee", "mca01", "seed01"]
    for path in out.rglob("*_dseg.json"):
        warning = json.loads(path.read_text())["Warning"]
        assert "--sloppy (2 mm grid)" in warning and "members" not in warning  # `Members` lists them
    assert "sloppy" in (out / "dataset_description.json").read_text()
    assert "sloppy" in (out / "sub-02.html").read_text()


def test_dry_run_writes_nothing(app, tmp_path, capsys):
    before = set(tmp_path.rglob("*"))
    assert app(tmp_path / "out", "--dry-run", "--bids-database-dir", str(tmp_path / "database")) == 0
    told = capsys.readouterr().out
    assert "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz" in told
    assert re.search(r"about \d+ min on \d+ processor.*, \d+\.\d GB in the work directory, \d+\.\d GB of results", told)
    assert set(tmp_path.rglob("*")) == before


def test_dry_run_ends_as_the_run_would(dataset, small_ensemble, linear, tmp_path, capsys):
    bids_dir = shutil.copytree(dataset, tmp_path / "bids")
    (bids_dir / "sub-01").rename(bids_dir / "aside")
    (bids_dir / "sub-03" / "anat").mkdir(parents=True)
    app = Run(bids_dir, small_ensemble)
    told, few = [], (*linear, "--members", "ieee")
    for options in ((), ("--dry-run",)):
        assert app(tmp_path / "out", *few, *options) == 1
        told += re.findall("ERROR: .*", capsys.readouterr().err)
    assert told[0] == told[1] and told[0].startswith("ERROR: sub-03: no ")
    named = ("--participant-label", "02", "--dry-run")
    assert app(tmp_path / "out", *few, *named) == 0


def test_reports_only_draws_the_same_report_again(finished, app):
    before = digests(finished)
    (finished / "sub-01.html").unlink()
    assert app(finished, "--reports-only") == 0
    assert digests(finished) == before


def test_reports_only_without_derivatives_says_what_is_missing(app, tmp_path, capsys):
    assert app(tmp_path / "out", "--reports-only") == 1
    assert "Run without --reports-only" in capsys.readouterr().err


def test_outputs_are_written_again_where_they_were_deleted(finished, app, linear):
    before = digests(finished)
    for path in finished.rglob("sub-02_*_dseg.nii.gz"):
        path.unlink()
    assert app(finished, *linear, "--write-members", "--participant-label", "02") == 0
    assert digests(finished) == before


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--participant-label", "99"], 18, "99"),
        (["--participant-label", "../x"], 64, "x"),
        (["--members", "mca77"], 65, "It has ieee, mca01"),
        (["--device", "cuda:7"], 64, "--device cuda:7"),
        (["--mem", "1G"], 64, "largest step needs"),
    ],
)
def test_impossible_requests_have_their_exit_code(app, tmp_path, capsys, options, code, message):
    assert app(tmp_path / "out", *options) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_validator_looks_at_those_that_are_left(app, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(validation, "validate_input", lambda _, labels: seen.append(list(labels)))
    arguments = app.arguments(tmp_path / "out", "--dry-run")
    arguments.remove("--skip-bids-validation")
    assert main([*arguments, "--exclude-participant-label", "02"]) == 0
    assert main([*arguments, "--participant-label", "99"]) == 18
    assert main(arguments) == 0
    assert seen == [["01"], []]


def test_no_home_directory_is_needed(app, tmp_path):
    """As with ``docker -u 12345`` and no HOME: pybids reads its settings from there on import."""
    code = (
        "import os, pwd, sys\n"
        "def nobody(_): raise KeyError\n"
        "pwd.getpwuid = nobody; os.environ.pop('HOME', None)\n"
        "from bids_varaug.cli.run import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, *app.arguments(tmp_path / "out", "--dry-run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_temporary_folder_with_a_long_path_is_named(app, tmp_path):
    folder = tmp_path / ("x" * 100)  # no room for the name of a socket
    folder.mkdir()
    command = [sys.executable, "-c", "import sys; from bids_varaug.cli.run import main; "
               "sys.exit(main())", *app.arguments(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(folder)}
    )
    assert done.returncode == 73
    assert done.stderr.startswith("ERROR: ") and "Set TMPDIR" in done.stderr


def test_main_process_does_not_wait_for_torch(app, tmp_path):
    code = (
        "import os, sys; from bids_varaug.cli.run import main\n"
        "from bids_varaug.workflows import plugins\n"
        "def stop(*_): print('torch' in sys.modules, flush=True); os._exit(0)\n"
        "plugins.run_workflow = stop; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *app.arguments(tmp_path / "out", "--device", "cpu")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_refused_run_leaves_no_server_of_workers_behind(app, tmp_path):
    """It would import torch to the end, seconds after the command was told to be wrong."""
    code = "import sys; from bids_varaug.cli.run import main; sys.exit(main())"
    wrong = app.arguments(tmp_path / "out", "--participant-label", "nobody")
    process = subprocess.Popen([sys.executable, "-c", code, *wrong], start_new_session=True)
    assert process.wait(120) == 18
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            session = stat.read_text().rpartition(")")[2].split()[3]
            command = stat.with_name("cmdline").read_bytes()
        except OSError:
            continue  # it ended meanwhile
        assert session != str(process.pid) or b"forkserver" not in command


def test_interrupted_run_says_how_to_go_on(app, tmp_path, monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_run, "run_participant_level", interrupt)
    assert app(tmp_path / "out") == 130
    assert "same -w" in capsys.readouterr().err


def test_damaged_ensemble_stops_before_anything_is_written(app, tmp_path, small_ensemble, capsys):
    path = small_ensemble / "mca01.safetensors"
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert app(tmp_path / "out") == 65
    finally:
        path.write_bytes(content)
    assert "mca01.safetensors: checksum differs" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.nii.gz"))


def test_invalid_bids_stops_with_its_own_code(small_ensemble, tmp_path, capsys):
    bids_dir = tmp_path / "bids"
    write_t1w(bids_dir, "sub-01")
    (bids_dir / "dataset_description.json").write_text("{}")
    arguments = Run(bids_dir, small_ensemble).arguments(tmp_path / "out")
    assert main([a for a in arguments if a != "--skip-bids-validation"]) == 16
    assert "dataset_description.json" in capsys.readouterr().err
