"""What repeated runs have in common, on files of known spread."""

import json

import nibabel as nib
import numpy as np
import pytest
from scipy.io import savemat

from bids_varaug.cli.perturb import compare_main
from bids_varaug.errors import NoInputError, UserError
from bids_varaug.pipelines.compare import compare_runs, displacement_between, find_runs, read_affine

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
STATS = """# ColHeaders  Index SegId NVoxels Volume_mm3 StructName
  1  17  {volume}  {volume}.0  Left-Hippocampus
"""


@pytest.fixture
def runs(tmp_path):
    """A run without noise and three with: labels, an image, a warp, affine matrices, tables."""
    for number, name in enumerate(("ieee", "mca01", "mca02", "mca03")):
        folder = tmp_path / "out" / name
        (folder / "stats").mkdir(parents=True)
        labels = np.zeros((12, 12, 12), np.int16)
        labels[2:6, 2:6, 2:6] = 17
        labels[6, 2:6, 2 : 2 + max(number - 1, 0)] = 17
        labels[8:10, 8:10, 8:10] = 1002
        save(labels, folder / "x_dseg.nii.gz")
        save(np.full((12, 12, 12), 100.0 + number), folder / "image.nii.gz")
        warp = np.zeros((12, 12, 12, 1, 3), np.float32)
        warp[..., 0] = 3 + 0.1 * number
        warp[..., 1:] = 2.0
        image = nib.Nifti1Image(warp, AFFINE)
        image.header.set_intent("vector")
        image.to_filename(folder / "x1Warp.nii.gz")
        parameters = np.array([1, 0, 0, 0, 1, 0, 0, 0, 1, 0.01 * number, 0, 0], float)
        savemat(folder / "x0GenericAffine.mat", {"AffineTransform_double_3_3": parameters[:, None],
                                                 "fixed": np.array([[10.0], [20.0], [30.0]])}, format="4")  # fmt: skip
        (folder / "stats/aseg.stats").write_text(STATS.format(volume=1000 + 10 * number))
        (folder / "table.tsv").write_text(f"name\tthickness\tnote\nx\t{2 + number / 10}\ta\n")
        (folder / "log.txt").write_text(f"{number}")
    (tmp_path / "out/logs").mkdir()
    return tmp_path / "out"


def save(data, path):
    nib.Nifti1Image(data, AFFINE).to_filename(path)


def rows(found, kind):
    return found.table[found.table["kind"] == kind].set_index("name")


def test_spread_is_over_the_runs_with_noise(runs):
    assert list(find_runs([runs])) == ["mca01", "mca02", "mca03"]
    found = compare_runs(find_runs([runs]), {17: "Left-Hippocampus"})
    labels = rows(found, "labels")
    volumes = (64 + 4 * np.arange(3)) * 8
    assert labels.loc["Left-Hippocampus", "mean"] == pytest.approx(volumes.mean())
    assert labels.loc["Left-Hippocampus", "sd"] == pytest.approx(volumes.std(ddof=1))
    assert labels.loc["Left-Hippocampus", "dice_min"] == pytest.approx(2 * 64 / (64 + 72))
    assert labels.loc["1002", "dice_min"] == 1 and labels.loc["1002", "sigbits"] == 24
    kind, entropy, _ = found.maps["x_dseg.nii.gz"]
    assert kind == "labels" and entropy[6, 2, 3] == pytest.approx(-np.log2(2 / 3) * 2 / 3 - np.log2(1 / 3) / 3)
    assert np.count_nonzero(entropy) == 8 and entropy[3, 3, 3] == 0

    scalar = found.table[found.table["kind"] == "scalar"].iloc[0]
    assert (scalar["mean"], scalar["sd"]) == (102, 1) and scalar["sigbits"] == pytest.approx(np.log2(102), abs=1e-5)
    assert scalar["sigbits_general"] == 6  # 1 / 102 is below 2^-6
    warp = found.table[found.table["kind"] == "displacement"].iloc[0]
    assert warp["sd"] == pytest.approx(0.1, abs=1e-6) and warp["unit"] == "mm"
    affine = found.table[found.table["kind"] == "affine"].iloc[0]
    assert affine["sd"] == pytest.approx(0.01) and affine["sd_max"] == pytest.approx(0.01)
    tables = rows(found, "table")
    assert tables.loc["Left-Hippocampus", "sd"] == pytest.approx(10)
    assert tables.loc["x a thickness", "mean"] == pytest.approx(2.2)


def test_files_that_some_runs_lack_or_that_do_not_fit_are_told(runs):
    (runs / "mca02/image.nii.gz").unlink()
    save(np.zeros((5, 5, 5), np.int16), runs / "mca03/x_dseg.nii.gz")
    (runs / "mca01/x1Warp.nii.gz").write_bytes(b"damaged")
    (runs / "mca01/stats/aseg.stats").write_text("# ColHeaders")
    found = compare_runs(find_runs([runs]), {})
    assert set(found.table["kind"]) == {"affine", "table"}
    text = " ".join(found.notes)
    for what in ("Not in every run, left out: image.nii.gz", "x_dseg.nii.gz: left out, the runs' images have different",
                 "x1Warp.nii.gz: left out", "aseg.stats: left out"):  # fmt: skip
        assert what in text


def test_one_run_has_no_spread(runs, tmp_path):
    with pytest.raises(UserError, match="fewer than two runs"):
        find_runs([runs / "mca01"])
    with pytest.raises(NoInputError, match="no such folder"):
        find_runs([tmp_path / "nowhere"])
    assert list(find_runs([runs / "ieee", runs / "mca01"])) == ["ieee", "mca01"]


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (["s,v\nHipp,4000\nAcc,600\nThal,8000\n", "s,v\nThal,8010\nHipp,4010\n"], {"Hipp v": 4005, "Thal v": 8005}),
        (["5,1.25\n6,3.5\n", "5,1.75\n6,3.5\n"], {"1 0": 5, "1 1": 1.5, "2 0": 6, "2 1": 3.5}),
        (["a,b\n1,2\ntext,4\n", "a,b\n3,2\nother,4\n"], {"1 a": 2, "1 b": 2, "2 b": 4}),
    ],
)
def test_rows_of_tables_are_matched_by_their_names(tmp_path, contents, expected):
    for number, content in enumerate(contents):
        (tmp_path / f"run{number}").mkdir()
        (tmp_path / f"run{number}/t.csv").write_text(content)
    found = compare_runs(find_runs([tmp_path / "run0", tmp_path / "run1"]), {})
    assert found.table.set_index("name")["mean"].to_dict() == expected
    assert any("some runs lack" in note for note in found.notes) == ("Acc" in contents[0])


def test_affines_of_several_programs_are_read(tmp_path):
    turn = np.array([[0, -1, 0, 5], [1, 0, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1]], float)
    np.savetxt(tmp_path / "fsl.mat", turn)
    np.testing.assert_array_equal(read_affine(tmp_path / "fsl.mat"), turn)
    numbers = " ".join(map(str, [*turn[:3, :3].ravel(), *turn[:3, 3]]))
    itk = f"#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\nParameters: {numbers}\n"
    (tmp_path / "itk.txt").write_text(itk + "FixedParameters: 1 2 3\n")
    about = read_affine(tmp_path / "itk.txt")
    np.testing.assert_allclose(about @ [1, 2, 3, 1], [1 + 5, 2 + 6, 3 + 7, 1])  # the centre moves by the translation
    lines = "".join(" ".join(map(str, row)) + " \n" for row in turn)
    lta = f"type      = 1 # LINEAR_RAS_TO_RAS\nnxforms = 1\n1 4 4\n{lines}"
    (tmp_path / "x.lta").write_text(lta)
    np.testing.assert_array_equal(read_affine(tmp_path / "x.lta"), turn)
    (tmp_path / "x.lta").write_text(lta.replace("= 1", "= 0", 1))
    assert read_affine(tmp_path / "x.lta") is None
    (tmp_path / "words.txt").write_text("nothing of the kind\n")
    assert read_affine(tmp_path / "words.txt") is None


def test_the_distance_of_affines_is_the_mean_over_a_sphere():
    rng = np.random.default_rng(0)
    points = rng.standard_normal((200_000, 3))
    points *= 80 * (rng.random(len(points)) ** (1 / 3) / np.linalg.norm(points, axis=1))[:, None]
    other = np.eye(4)
    other[:3] += 0.02 * rng.standard_normal((3, 4))
    moved = points @ (other - np.eye(4))[:3, :3].T + other[:3, 3]
    assert displacement_between(np.eye(4), other) == pytest.approx(np.sqrt((moved**2).sum(axis=1).mean()), rel=0.01)


@pytest.mark.parametrize(("kind", "bits"), [(np.float64, 53), (np.float32, 24), (np.int16, 24)])
def test_values_have_the_bits_of_their_type(tmp_path, kind, bits):
    """Ten runs: the mean of ten times 100.1 is rounded."""
    for number in range(10):
        (tmp_path / f"run{number}").mkdir()
        save(np.full((4, 4, 4), 100.1, kind), tmp_path / f"run{number}/image.nii")
        (tmp_path / f"run{number}/t.csv").write_text(f"s,v,w\nx,100.1,{1 + number * 2.0**-40!r}\n")
    found = compare_runs(find_runs([tmp_path]), {})
    assert found.table.loc[found.table["kind"] == "scalar", "sigbits"].tolist() == [bits]
    exact, near = (rows(found, "table").loc[f"x {name}"] for name in "vw")
    assert (exact["sd"], exact["sigbits"], exact["sigbits_general"]) == (0, 53, 53)
    assert 38 < near["sigbits"] < 39


def test_tables_and_images_have_an_answer_too(tmp_path):
    for number in range(2):
        (tmp_path / f"runs/run{number}").mkdir(parents=True)
        (tmp_path / f"runs/run{number}/t.csv").write_text(f"s,v\nHipp,{4000 + number}\nAcc,{600 + 10 * number}\n")
    assert compare_main([str(tmp_path / "runs"), "-o", str(tmp_path / "out")]) == 0
    answer = (tmp_path / "out/comparison.html").read_text().partition("If the runs differ")[0]
    assert "Of 2 numbers in tables, <b>Acc v</b>" in answer and "6.4 significant bits" in answer
    save(np.full((4, 4, 4), 1.0), tmp_path / "runs/run0/image.nii")
    save(np.full((4, 4, 4), 1.5), tmp_path / "runs/run1/image.nii")
    assert compare_main([str(tmp_path / "runs"), "-o", str(tmp_path / "out")]) == 0
    assert "Of 1 image, image.nii varies most:" in (tmp_path / "out/comparison.html").read_text()


def test_page_tables_and_maps(runs, tmp_path, capsys):
    out = tmp_path / "compared"
    save(np.arange(12**3, dtype=np.float32).reshape(12, 12, 12), tmp_path / "t1w.nii.gz")
    flags = ["--background", str(tmp_path / "t1w.nii.gz"), "--participant", "sub-01"]
    assert compare_main([str(runs), "-o", str(out), *flags]) == 0
    page = (out / "comparison.html").read_text()
    assert "Two runs agree least about <b>Left-Hippocampus</b>" in page and "0.941" in page
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert compare_main([str(runs), "-o", str(out), *flags]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    entropy = nib.load(out / "x_dseg_desc-labels_entropy.nii.gz")
    assert np.count_nonzero(entropy.get_fdata()) == 8
    about = json.loads((out / "x_dseg_desc-labels_entropy.json").read_text())
    assert (about["Units"], about["File"], len(about["Runs"])) == ("bit", "x_dseg.nii.gz", 3)
    assert {path.name.partition("_")[0] for path in out.glob("*_sd.json")} == {"image", "x1Warp"}
    from bids_varaug.brainage.repeated_runs import read_repeated_runs

    cohort = read_repeated_runs(out / "volumes.tsv")  # as the group level's --compare does
    assert cohort.members.shape == (1, 3, 2) and cohort.unit == "mm3"
    save(np.zeros((5, 5, 5)), tmp_path / "t1w.nii.gz")
    assert compare_main([str(runs), "-o", str(out), *flags]) == 65
    assert "another grid" in capsys.readouterr().err
