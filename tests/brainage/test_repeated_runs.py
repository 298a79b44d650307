"""Reading other pipelines' repeated runs."""

import numpy as np
import pytest

from bids_varaug.brainage.repeated_runs import (
    read_repeated_runs,
)
from bids_varaug.brainage.variability import compare_pipelines, numerical_variability
from bids_varaug.errors import NoInputError, UserError
from bids_varaug.inputs.freesurfer import read_aseg_stats, read_minimum_dice_csv

STATS = """\
# Title Segmentation Statistics
# Measure lhCortex, lhCortexVol, Left hemisphere cortical gray matter volume, {cortex}, mm^3
# Measure SurfaceHoles, SurfaceHoles, Total number of defect holes, 29, unitless
# ColHeaders  Index SegId NVoxels Volume_mm3 StructName normMean
  1  17  4000  {hippocampus}  Left-Hippocampus  74.9
  2  10  8000  {thalamus}  Left-Thalamus-Proper  74.9
"""


def write_stats(folder, value=0.0):
    path = folder / "stats" / "aseg.stats"
    path.parent.mkdir(parents=True)
    path.write_text(STATS.format(cortex=240000.5 + value, hippocampus=4000.1 + value,
                                 thalamus=8000.0 + 2 * value))  # fmt: skip
    return path


def test_stats_of_real_freesurfer(shared_data):
    volumes = read_aseg_stats(shared_data / "t1w/bert/stats/aseg.stats")
    assert volumes["Left-Hippocampus"] == 4422.1
    assert volumes["Right-Cerebral-Cortex"] == 242689.917301
    assert len(volumes) == 49  # 45 structures, and cortex and white matter of either side


@pytest.mark.parametrize("layout", ["sub-0{p}/run-{r}", "sub-0{p}/ses-1/run-{r}", "sub-0{p}_{r}",
                                    "run-{r}/sub-0{p}", "p{p}/{r}"])  # fmt: skip
def test_layouts_of_stats_directories(tmp_path, layout):
    for p in (1, 2, 3):
        for r in (1, 2, 3):
            write_stats(tmp_path / layout.format(p=p, r=r), value=10 * p + r)
    cohort = read_repeated_runs(tmp_path)
    assert len(cohort) == 3 and cohort.members.shape == (3, 3, 3)
    assert set(cohort.names) == {"Left-Hippocampus", "Left-Thalamus", "Left-Cerebral-Cortex"}
    hippocampus = cohort.members[:, :, cohort.names.index("Left-Hippocampus")]
    assert np.allclose(hippocampus[1], 4020.1 + np.array([1, 2, 3]))
    if "ses-1" in layout:
        assert cohort.people["session_id"].tolist() == ["ses-1"] * 3


DKT = """\
# Title Segmentation Statistics
# generating_program segstats.py
# Measure BrainSeg, BrainSegVol, Brain Segmentation Volume, 1385005.314630, mm^3
# ColHeaders  Index SegId NVoxels Volume_mm3 StructName normMean normStdDev normMin normMax normRange
  1   2    221873 223426.623  Left-Cerebral-White-Matter       104.1800     9.5562    27.0  178.0  151.0
  2  10      8181 {thalamus}  Left-Thalamus                     74.9        9.1       27.0  120.0   93.0
  3 1002     1781   3032.25   ctx-lh-caudalanteriorcingulate    80.1        9.0       27.0  120.0   93.0
  4 1003     3015   6116.5    ctx-lh-caudalmiddlefrontal        80.1        9.0       27.0  120.0   93.0
  5 2002     1341   2442.125  ctx-rh-caudalanteriorcingulate    80.1        9.0       27.0  120.0   93.0
"""


@pytest.mark.parametrize(
    "name", ["aseg+DKT.stats", "aseg+DKT.VINN.stats", "aseg.VINN.stats", "aparc+DKT.stats",
             "aparc.DKTatlas+aseg.deep.volume.stats"]
)  # fmt: skip
def test_tables_of_fastsurfers_segmentation_alone(tmp_path, name):
    for p in (1, 2):
        for r in (1, 2):
            path = tmp_path / f"sub-{p}" / f"run-{r}" / "stats" / name
            path.parent.mkdir(parents=True)
            path.write_text(DKT.format(thalamus=8000.5 + 100 * p + r))
    cohort = read_repeated_runs(tmp_path)
    assert cohort.unit == "mm3" and cohort.members.shape[:2] == (2, 2)
    thalamus, cortex = (
        cohort.members[:, :, cohort.names.index(name)]
        for name in ("Left-Thalamus", "Left-Cerebral-Cortex")
    )
    assert thalamus.tolist() == [[8101.5, 8102.5], [8201.5, 8202.5]]
    assert (cortex == 3032.25 + 6116.5).all() and "Right-Cerebral-Cortex" in cohort.names
    assert "Left-Cerebral-White-Matter" in cohort.names


def test_parcels_of_both_hemispheres_are_one_run(tmp_path, shared_data):
    stats = shared_data / "t1w/bert/stats"
    for r in (1, 2):
        (tmp_path / f"sub-1/run-{r}/stats").mkdir(parents=True)
        for name in ("lh.aparc.DKTatlas.stats", "rh.aparc.DKTatlas.stats"):
            (tmp_path / f"sub-1/run-{r}/stats" / name).write_bytes((stats / name).read_bytes())
    cohort = read_repeated_runs(tmp_path)
    volumes = dict(zip(cohort.names, cohort.baseline[0], strict=True))
    # The measure of the same surfaces, which counts a little more.
    cortex = read_aseg_stats(stats / "aseg.stats")["Left-Cerebral-Cortex"]
    assert volumes["Left-Cerebral-Cortex"] == pytest.approx(cortex, rel=0.06)
    assert volumes["ctx-rh-cuneus"] == 3878


def test_the_final_table_goes_before_others_unless_few_folders_have_it(tmp_path):
    for p in (1, 2):
        for r in (1, 2):
            path = write_stats(tmp_path / f"sub-{p}" / f"run-{r}", r)
            path.with_name("aseg+DKT.stats").write_text(DKT.format(thalamus=1.0))
    assert "Left-Hippocampus" in read_repeated_runs(tmp_path).names
    for p, r in ((1, 2), (2, 1), (2, 2)):
        (tmp_path / f"sub-{p}/run-{r}/stats/aseg.stats").unlink()
    cohort = read_repeated_runs(tmp_path)
    assert len(cohort) == 2 and "Left-Hippocampus" not in cohort.names


def test_a_single_stats_file_says_to_give_the_folder_above(tmp_path):
    path = write_stats(tmp_path / "sub-1")
    with pytest.raises(UserError, match="aseg.stats: one run has no spread. Give the folder above"):
        read_repeated_runs(path)


def test_stats_end_in_a_comparison(tmp_path):
    rng = np.random.default_rng(0)
    for p in range(5):
        for r in range(3):
            write_stats(tmp_path / f"sub-{p}" / f"run-{r}", 100 * p + rng.normal())
    table = numerical_variability(read_repeated_runs(tmp_path))
    assert (table["ratio"] < 0.1).all()
    assert compare_pipelines(table, table)["n"].tolist() == [3, 3]


def test_single_and_fewer_runs(tmp_path):
    for run in "abc":
        write_stats(tmp_path / "sub-1" / run)
    for run in "ab":
        write_stats(tmp_path / "sub-2" / run)
    write_stats(tmp_path / "sub-3" / "a")
    cohort = read_repeated_runs(tmp_path)
    assert np.isnan(cohort.members[1, 2]).all() and np.isfinite(cohort.members[1, :2]).all()
    assert list(cohort.left_out) == ["sub-3"]


def test_table_of_members(tmp_path):
    path = tmp_path / "runs.tsv"
    path.write_text(
        "participant_id\tmember\tHip\tAmy\n1\tb\t2.0\tn/a\n1\ta\t1.0\t5\n2\ta\t3\t6\n2\tb\t4\t7\n"
    )
    cohort = read_repeated_runs(path)
    assert cohort.names == ("Hip",)  # Amy is missing in a run
    assert cohort.members[:, :, 0].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert cohort.people["participant_id"].tolist() == ["1", "2"]
    assert read_repeated_runs(tmp_path).names == ("Hip",)  # the folder's only table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("participant_id\tHip\n1\t2\n", "no column member"),
        ("participant_id\tmember\tHip\n1\ta\t1\n1\ta\t2\n", "run a of 1 is there twice"),
        ("participant_id\tmember\tHip\n1\ta\t1\n2\ta\t2\n", "nobody has two runs"),
        ("participant_id\tmember\tHip\n1\ta\tx\n1\tb\t2\n", "Hip is not numeric"),
        ("participant_id\tmember\tHip\n1\ta\t1\n1\t\t2\n", "line 3"),
        ("participant_id\tmember\tHip\n1\ta\tn/a\n1\tb\t2\n", "no structure"),
    ],
)
def test_bad_tables_are_explained(tmp_path, text, message):
    path = tmp_path / "runs.tsv"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_repeated_runs(path)
    assert "runs.tsv" in str(error.value)


@pytest.mark.parametrize(
    "cut", ["# Title\n", STATS[:250], STATS.split("  2  10")[0] + "  2  10  8"]
)
def test_truncated_stats_are_named(tmp_path, cut):
    path = write_stats(tmp_path / "sub-1" / "a")
    path.write_text(cut.format(cortex=1, hippocampus=2, thalamus=3))
    with pytest.raises(UserError, match="aseg.stats.*again"):
        read_repeated_runs(tmp_path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(NoInputError, match="no such folder"):
        read_repeated_runs(tmp_path / "x")
    with pytest.raises(NoInputError, match="no aseg.stats"):
        read_repeated_runs(tmp_path)


def test_minimum_dice_is_averaged_over_people_and_regions_are_named_as_ours(tmp_path):
    path = tmp_path / "dice.csv"
    path.write_text("Left-Thalamus-Proper,CSF,subjectID\n0.9,0.5,25531\n0.7,,25532\n")
    table = read_minimum_dice_csv(path).set_index("name")
    assert table["dice_min"].to_dict() == pytest.approx({"Left-Thalamus": 0.8, "CSF": 0.5})
    assert table["n_participants"].to_dict() == {"Left-Thalamus": 2, "CSF": 1}


@pytest.mark.parametrize("text", ["", "a\tb\n1\t2\n", "subjectID,CSF\n1,1.5\n", "subjectID\n1\n"])
def test_what_holds_no_dice_is_refused(tmp_path, text):
    path = tmp_path / "dice.csv"
    path.write_text(text)
    with pytest.raises(UserError, match="dice.csv"):
        read_minimum_dice_csv(path)


def test_published_tables_have_the_means_that_were_published(shared_data):
    root = shared_data / "paper_tables/structural_mri_uncertainty"
    fs, fast = (
        read_minimum_dice_csv(root / f"{tool}_min_dice_scores.csv") for tool in ("fs", "fast")
    )
    assert fs["dice_min"].mean() == pytest.approx(0.923, abs=5e-4)  # arXiv:2308.01939
    row = compare_pipelines(fast, fs).iloc[0]
    assert row["measure"] == "1 - dice_min" and row["high"] < 0.05 and row["p_value"] < 2e-6
