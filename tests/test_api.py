"""One image without a BIDS dataset: the same results as those of the app."""

import gc
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

import bids_varaug
from bids_varaug.api import check_output_dir, segment
from bids_varaug.cli.run import segment_main as main
from bids_varaug.errors import ExitCode, OutputError, ScanError, UsageError
from tests.workflows.conftest import app, dataset, linear, small_ensemble

__all__ = ["app", "dataset", "linear", "small_ensemble"]  # fixtures

PREFIX = "sub-02_acq-las_run-1"
MEMBERS = ("ieee", "mca")


@pytest.fixture(scope="module")
def written(app, linear, tmp_path_factory) -> Path:
    """What the app writes for one image."""
    out = tmp_path_factory.mktemp("app") / "out"
    assert app(out, *linear, "--participant-label", "02", "--members", *MEMBERS) == 0
    return out / "sub-02" / "anat"


@pytest.fixture(scope="module")
def t1w(dataset) -> Path:
    return dataset / "sub-02" / "anat" / f"{PREFIX}_T1w.nii.gz"


@pytest.fixture(scope="module")
def result(t1w, small_ensemble):
    return segment(t1w, ensemble=small_ensemble, members=MEMBERS, device="cpu", n_threads=2)


def table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t", na_values="n/a")


def test_images_are_those_of_the_app(result, written):
    for image, ending in (
        (result.labels, "seg-varaug_desc-consensus_dseg"),
        (result.entropy, "seg-varaug_stat-entropy_statmap"),
        (result.uncertainty, "seg-varaug_stat-totalentropy_statmap"),
        (result.image("mutual_information"), "seg-varaug_stat-mutualinformation_statmap"),
        (result.image("sigbits"), "seg-varaug_stat-sigbits_statmap"),
        (result.image("std"), "seg-varaug_stat-std_statmap"),
        (result.unreliable, "label-unreliable_mask"),
    ):
        expected = nib.load(written / f"{PREFIX}_{ending}.nii.gz")
        assert np.array_equal(image.get_fdata(), expected.get_fdata())
        assert np.array_equal(image.affine, expected.affine)
        # Files hold steps, images their values.
        assert image.get_data_dtype() == (np.float32 if "statmap" in ending else expected.get_data_dtype())
    posterior = nib.load(written / f"{PREFIX}_seg-varaug_desc-mean_probseg.nii.gz").get_fdata()
    np.testing.assert_allclose(result.image("mean_probseg").get_fdata(), posterior, rtol=1e-6)
    assert np.unique(result.labels.get_fdata()).size > 2 and result.entropy.get_fdata().max() > 0


def test_tables_are_those_of_the_app(result, written):
    long = table(written / f"{PREFIX}_seg-varaug_desc-members_morph.tsv")
    assert list(result.volumes) == ["ieee", "mca01", "mca02"]
    assert list(result.volumes.index) == list(long["name"].unique())
    for _, row in long.iterrows():
        assert result.volumes.loc[row["name"], row["member"]] == row["volume"]
    regions = table(written / f"{PREFIX}_seg-varaug_desc-consensus_dseg.tsv")
    pd.testing.assert_frame_equal(result.regions.reset_index()[list(regions)], regions)


def test_image_in_memory_gives_the_labels_of_its_file(result, t1w, small_ensemble):
    loaded = nib.load(t1w)
    copy = nib.Nifti1Image(loaded.get_fdata(dtype=np.float32), loaded.affine)
    for image in (loaded, copy):
        again = segment(image, ensemble=small_ensemble, members="ieee", device="cpu", n_threads=1)
        assert np.array_equal(again.labels.get_fdata(), result.image("ieee_dseg").get_fdata())


def test_members_are_chosen_as_in_the_app(t1w, small_ensemble):
    seeds = segment(t1w, ensemble=small_ensemble, members=["seed"], n_members=1, device="cpu")
    assert list(seeds.volumes) == ["seed01"]
    assert seeds.entropy is None and seeds.image("mutual_information") is None
    assert seeds.uncertainty.get_fdata().max() > 0 and seeds.unreliable.shape == seeds.labels.shape
    assert any("one member" in warning for warning in seeds.warnings)


def test_everything_is_saved_and_the_temporary_folder_is_removed(t1w, small_ensemble, tmp_path):
    result = segment(t1w, ensemble=small_ensemble, members="mca", family_maps=True, device="cpu")
    folder = result._request.settings.output_dir
    labels = result.labels
    files = {path.name for path in result.save(tmp_path / "out", report=True)}
    assert {f"{PREFIX}_seg-varaug_desc-consensus_dseg.nii.gz", "seg-varaug_dseg.tsv",
            f"{PREFIX}_seg-varaug_stat-entropy_desc-mca_statmap.nii.gz",
            "dataset_description.json", "sub-02.html", "CITATION.md", "CITATION.bib"} <= files  # fmt: skip
    with pytest.raises(UsageError, match="BIDS dataset"):
        result.save(tmp_path / "out")
    del result
    gc.collect()
    assert not folder.exists() and labels.get_fdata().any()


def test_figures_are_those_of_the_report(result):
    figure = result.plot("entropy")
    assert figure.axes[0].images[0].get_array().shape[2] >= 3
    with pytest.raises(ValueError, match="no figure 'nothing'; there are consensus, total_entropy, entropy"):
        result.plot("nothing")


def test_command_writes_what_the_app_writes(written, t1w, small_ensemble, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ("--ensemble", str(small_ensemble), "--members", *MEMBERS, "--device", "cpu", "--report")
    assert main([str(t1w), str(out), *flags]) == 0
    name = f"{PREFIX}_seg-varaug_desc-consensus_dseg.nii.gz"
    assert np.array_equal(nib.load(out / name).get_fdata(), nib.load(written / name).get_fdata())
    assert (out / "sub-02.html").is_file()
    assert f"Done. The results are in {out}." in capsys.readouterr().err


def test_four_dimensions_are_refused_as_in_the_app(tmp_path, capsys):
    image = nib.Nifti1Image(np.ones((20, 20, 20, 2), np.float32), np.eye(4) * 4)
    with pytest.raises(ScanError, match=r"4D image \(20 x 20 x 20 x 2\). A T1w must be one volume"):
        segment(image)
    nib.save(image, tmp_path / "sub-1_T1w.nii")
    with pytest.raises(ScanError, match=r"sub-1_T1w.nii: 4D image"):
        segment(tmp_path / "sub-1_T1w.nii")
    assert main([str(tmp_path / "sub-1_T1w.nii"), str(tmp_path / "new" / "out")]) == 1
    assert "--" not in capsys.readouterr().err  # no flags of the app
    assert not (tmp_path / "new").exists()


def test_image_without_affine_is_refused(tmp_path):
    with pytest.raises(ScanError, match="no affine"):
        segment(np.ones((30, 30, 30)))
    with pytest.raises(ScanError, match="no orientation"):
        segment(nib.Nifti1Image(np.ones((30, 30, 30), np.int16), None))
    with pytest.raises(ScanError, match="NoneType has no affine"):
        segment(None)


def test_missing_file_has_the_code_of_a_missing_dataset_and_leaves_no_folder(tmp_path, capsys):
    with pytest.raises(ScanError, match="head.nii.gz: no such file"):
        segment(tmp_path / "head.nii.gz")
    assert main([str(tmp_path / "head.nii.gz"), str(tmp_path / "new" / "out")]) == ExitCode.NO_INPUT
    assert "head.nii.gz: no such file" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_command_refuses_folders(dataset, t1w, tmp_path, capsys):
    assert main([str(dataset), str(tmp_path / "out")]) == ExitCode.USAGE
    assert "run `bids_varaug BIDS_DIR OUTPUT_DIR participant`" in capsys.readouterr().err
    assert main([str(t1w), str(dataset)]) == ExitCode.USAGE
    assert "this is a BIDS dataset" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    assert main([str(t1w), str(tmp_path / "full")]) == ExitCode.USAGE
    assert "not empty" in capsys.readouterr().err


def test_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        check_output_dir(tmp_path / "file" / "out")

    def read_only(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(OutputError, match=r"cannot be written \(Read-only file system\)"):
        check_output_dir(tmp_path / "new")


def test_odd_names_and_types_are_taken(t1w, small_ensemble, tmp_path):
    data = np.round(nib.load(t1w).get_fdata()).astype(np.int64)
    image = nib.Nifti1Image(data, nib.load(t1w).affine, dtype=np.int64)
    result = segment(image, ensemble=small_ensemble, members="ieee", device="cpu")
    assert {path.name for path in result.save(tmp_path / "a")} >= {"image_seg-varaug_desc-consensus_dseg.nii.gz"}
    mgh = nib.MGHImage(data.astype(np.float32), nib.load(t1w).affine)
    again = segment(mgh, ensemble=small_ensemble, members="ieee", device="cpu")
    assert np.array_equal(again.labels.get_fdata(), result.labels.get_fdata())


def test_import_takes_no_time_and_promises_a_few_names():
    code = "import sys, bids_varaug; print(*(n for n in ('torch', 'numpy') if n in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
    assert sorted(dir(bids_varaug)) == ["MonteCarloArithmetic", "Segmentation", "__version__",
                                        "segment"]  # fmt: skip
    assert all(hasattr(bids_varaug, name) for name in dir(bids_varaug))
    with pytest.raises(AttributeError, match="nothing"):
        getattr(bids_varaug, "nothing")  # noqa: B009


@pytest.mark.parametrize(
    "argument", [{"n_members": 0}, {"members": []}, {"trust": "header"}, {"perturb_inference": -1}]
)
def test_arguments_are_checked_before_the_work(argument, t1w):
    with pytest.raises(UsageError, match=next(iter(argument))):
        segment(t1w, **argument)
