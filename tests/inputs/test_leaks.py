"""Columns that tell the age, the person or the row are no features, and no structure is lost."""

from importlib.resources import files

import numpy as np
import pandas as pd
import pytest

from bids_varaug.brainage.features_table import read_features_table
from bids_varaug.inputs.freesurfer import read_aseg_stats
from bids_varaug.inputs.leaks import reason_by_name, reasons_by_value


@pytest.mark.parametrize(
    "name",
    [
        "interview_age", "ScanAge", "Subject Age", "age_mo", "year of birth", "BirthYear",
        "birthplace", "brainAGE", "pyment_pred", "predicted_age", "brain_age_gap", "BrainPAD",
        "DOB", "yob", "age^2", "AgeAtMRI", "mriage", "MRIage", "agemonths", "Age.in.years",
        "log_age", "edad", "age_z", "SPARE_BA", "AgePrediction", "estimatedage", "mother_age",
        "Alter", "education_level",
        "Lebensalter", "geboren", "Geburtsdatum", "Geburtsjahr", "Altersgruppe", "ålder", "alder",
        "età", "eta_anni", "âge", "a\u0302ge", "annee_naissance", "date_naissance", "anno_nascita",
        "ano_nascimento", "idade", "leeftijd", "geboortejaar", "wiek", "rok_urodzenia", "возраст",
        "年龄", "나이", "yas", "yaş", "ikä", "vek", "Decennio", "edad_años", "fecha nacimiento",
        "agegrp", "ageonset", "lnage", "logage", "cage", "agey", "agem", "years_old", "months_old",
        "bday", "bioage", "decades_lived", "decades", "SFCN", "SFCN_out", "MCCQR", "MCCQRNN",
        "BAGap", "fødselsår", "ypred", "yhat", "y_hat", "y_pred",
    ],
)  # fmt: skip
def test_names_that_tell_the_age(name):
    assert reason_by_name(name) == "tells the age"


@pytest.mark.parametrize(
    "name",
    [
        "subject_number", "scan_number", "visit", "wave", "session_no", "accession number",
        "RID", "AccessionNumber", "acquisition time", "AcqTime", "visitno", "Row Number",
        "Unnamed: 0", "index", "scan#", "TimePoint", "tp_no", "months_since_baseline", "date",
        "VISCODE", "case_no", "FIQ", "sex_code", "site-id", "Height (cm)", "subNo", "ImageID",
        "", "jahr_scan", "år", "años", "over50", "grade", "EDUC", "EducYears", "GA", "PMA",
        "ga_weeks", "onset", "duration", "EID", "FID", "IID", "MRN", "nr", "numero", "Proband",
        "barcode", "famid", "YearScanned", "Untersuchungsdatum", "school_years",
        "female", "male", "is_male", "Geschlecht",
    ],
)  # fmt: skip
def test_names_of_people_rows_and_visits(name):
    assert reason_by_name(name) == "describes the person or the row, not the brain"


@pytest.mark.parametrize(
    "name",
    [
        "3rd-Ventricle", "rh_S_temporal_inf_thickness", "lh_MeanCurv", "eTIV", "avg_en",
        "Accessory", "Cartilage", "WM-hypointensities", "middle", "caudate-image", "Mid",
        "mid_brain", "stage", "brain_weight", "V1", "S1", "Average", "lesion_number",
        "Image_volume", "asymmetry_index", "NVoxels", "SurfaceHoles", "BrainSegVol-to-eTIV",
        "time-course volume", "Subiculum", "x", "1", "Agenesis_CC", "Percentage_WM", "Brain",
        "CC_Mid_Anterior", "Frontal_WM_R_mm3", "海馬", "FoldInd", "visitation",
        "left_site_volume", "run1_Left-Hippocampus", "index_L", "group_L", "PMA_R", "GA_vol",
        "lat", "Inf-Lat-Vent", "ant_insula", "organum", "corona", "Alveus", "Substantia_nigra",
        "overall_volume", "Pons", "Fornix", "lh_anterior", "ar_thickness", "CA1",
    ],
)  # fmt: skip
def test_names_of_structures_stay(name):
    assert reason_by_name(name) is None


def test_no_column_of_freesurfer_or_of_our_labels_is_lost(shared_data):
    names = list(read_aseg_stats(shared_data / "t1w/bert/stats/aseg.stats"))
    for line in (shared_data / "t1w/bert/stats/aseg.stats").read_text().splitlines():
        if line.startswith("# Measure"):
            names += [part.strip() for part in line.removeprefix("# Measure").split(",")[:2]]
    parcels = read_aseg_stats(shared_data / "t1w/bert/stats/lh.aparc.DKTatlas.stats")
    for measure in (
        "area",
        "volume",
        "thickness",
        "thicknessstd",
        "meancurv",
        "gauscurv",
        "foldind",
    ):
        names += [f"{name.replace('ctx-lh-', 'lh_')}_{measure}" for name in parcels]
    assert [name for name in names if reason_by_name(name)] == []


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("fcon1000_freesurfer.tsv", []),
        ("abide_males_freesurfer.tsv", ["fiq", "group"]),
        ("ixi_freesurfer_thickness.tsv", []),
        ("nichart_muse_ad.tsv", ["diagnosis"]),
    ],
)
def test_public_tables_keep_every_measure(shared_data, name, ignored):
    cohort = read_features_table(shared_data / "brain_age" / name)
    assert sorted(cohort.source["ignored_columns"]) == ignored


def test_our_names_are_kept():
    for table in ("aseg31.tsv", "training_labels.tsv"):
        names = pd.read_csv(files("bids_varaug") / "data" / table, sep="\t")["name"]
        assert len(names) > 30 and [name for name in names if reason_by_name(name)] == []


def people(n, rng, sessions=1):
    ids = np.repeat([f"sub-{i:03d}" for i in range(n)], sessions)
    return pd.DataFrame({"participant_id": ids, "age": np.repeat(rng.uniform(20, 80, n), sessions)})


@pytest.mark.parametrize("n", [8, 20, 200])
@pytest.mark.parametrize(
    "leak",
    [
        lambda age: age * 12,
        np.floor,
        lambda age: 2020 - np.floor(age),
        lambda age: np.floor((2020 - age) * 365.25),  # date of birth as a number
        lambda age: (age - age.mean()) / age.std(),
        lambda age: age**2,
        lambda age: np.log(age + 1),
    ],
)
def test_functions_of_age_are_found_whatever_their_name(n, leak):
    cohort = people(n, np.random.default_rng(n))
    values = pd.DataFrame({"x": leak(cohort["age"].to_numpy())})
    assert reasons_by_value(values, cohort) == {"x": "is almost a function of age"}


def test_whatever_rises_with_age_is_found_from_14_people():
    for n, found in ((13, False), (14, True), (100, True)):
        cohort = people(n, np.random.default_rng(n))
        values = pd.DataFrame({"x": np.exp(cohort["age"] / 4)})
        assert bool(reasons_by_value(values, cohort)) == found


@pytest.mark.parametrize("n", [5, 6, 8, 10, 15])
def test_volumes_of_few_people_are_hardly_ever_taken_for_ages(n):
    """Correlation 0.9, as of few structures in any cohort: fewer than 1 in 100 are refused."""
    rng = np.random.default_rng(n)
    cohort = people(n, rng)
    z = (cohort["age"].to_numpy() - 50) / np.sqrt(300)
    volumes = 0.9 * z[:, None] + np.sqrt(1 - 0.81) * rng.normal(size=(n, 2000))
    assert len(reasons_by_value(pd.DataFrame(volumes), cohort)) < 20


@pytest.mark.parametrize(
    "counter",
    [
        lambda rng: np.arange(1, 26),
        lambda rng: rng.permutation(25) * 10 + 1000,
        lambda rng: np.sort(rng.choice(30, 25, replace=False)),  # five people were left out
    ],
)
def test_counters_are_found_whatever_their_name(counter):
    rng = np.random.default_rng(0)
    values = pd.DataFrame({"x": counter(rng), "volume": rng.integers(3000, 5000, 25)})
    assert list(reasons_by_value(values, people(25, rng))) == ["x"]


def test_numbers_of_sessions_and_of_people_with_sessions_are_found():
    rng = np.random.default_rng(0)
    values = pd.DataFrame({"x": np.tile([1, 2, 3], 12), "y": np.repeat(np.arange(12), 3),
                           "lesions": rng.integers(0, 4, 36)})  # fmt: skip
    assert list(reasons_by_value(values, people(12, rng, 3))) == ["x", "y"]


@pytest.mark.parametrize("unknown", [0, 1])
def test_years_are_found_whatever_their_name(unknown):
    rng = np.random.default_rng(0)
    years = rng.integers(2004, 2009, 30).astype(float)
    years[:unknown] = 9999
    values = pd.DataFrame({"x": years, "two": rng.integers(2004, 2006, 30),
                           "volume": rng.normal(1970, 30, 30),
                           "voxels": rng.integers(1700, 2200, 30)})  # fmt: skip
    assert reasons_by_value(values, people(30, rng)) == {"x": "is a year"}


def test_leaks_are_left_out_with_a_note(tmp_path):
    rng = np.random.default_rng(0)
    ages = rng.uniform(20, 80, 30).round(2)
    table = pd.DataFrame({
        "participant_id": [f"sub-{i:02d}" for i in range(30)], "age": ages,
        "interview_age": (ages * 12).round(), "PTNO": rng.permutation(30) + 1,
        "q": 2020 - ages.round(), "Left-Hippocampus": rng.normal(4000, 300, 30),
    })  # fmt: skip
    table.to_csv(tmp_path / "features.tsv", sep="\t", index=False)
    cohort = read_features_table(tmp_path / "features.tsv")
    assert cohort.names == ("Left-Hippocampus",)
    assert cohort.source["notes"] == [
        "features.tsv: columns that are not used as features: interview_age (tells the age), "
        "PTNO (counts people, rows or sessions), q (is almost a function of age)."
    ]


def test_a_table_of_nothing_but_leaks_says_so(tmp_path):
    lines = "".join(f"{p}\t{20 + p}\t{p}\n" for p in range(20))
    (tmp_path / "features.tsv").write_text("participant_id\tage\tx\n" + lines)
    with pytest.raises(Exception, match="no feature is left.*x: is almost a function of age"):
        read_features_table(tmp_path / "features.tsv")
