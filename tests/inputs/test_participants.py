import json

import numpy as np
import pytest

from bids_varaug.errors import NoInputError, UserError
from bids_varaug.inputs.participants import read_people


@pytest.fixture
def dataset(tmp_path):
    """Write participants.tsv and what stands beside it; a raw dataset without images."""

    def write(text, sidecar=None, **more):
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "participants.tsv").write_bytes(data)
        if sidecar is not None:
            (tmp_path / "participants.json").write_text(json.dumps(sidecar))
        for name, content in more.items():
            path = tmp_path / f"sub-{name}" / f"sub-{name}_sessions.tsv"
            path.parent.mkdir()
            path.write_text(content)
        return tmp_path

    return write


def ages(people):
    return dict(zip(people.table["participant_id"], people.table["age"], strict=True))


def test_age_sex_and_site_are_read(dataset):
    people = read_people(
        dataset("participant_id\tage\tsex\tsite\nsub-01\t30.5\tF\tNY\nsub-02\t41\tmale\tn/a\n")
    )
    assert people.table.to_dict("list") == {
        "participant_id": ["sub-01", "sub-02"],
        "session_id": [None, None],
        "age": [30.5, 41.0],
        "sex": ["F", "M"],
        "site": ["NY", None],
    }
    assert not people.left_out and not people.notes


def test_no_sex_and_no_site_is_fine(dataset):
    people = read_people(dataset("participant_id\tage\nsub-01\t30\n"))
    assert people.table["sex"].tolist() == people.table["site"].tolist() == [None]


@pytest.mark.parametrize(
    ("unit", "value", "years"),
    [
        ("years", "2", 2.0),
        ("Years", "2", 2.0),
        ("yr", "2", 2.0),
        ("months", "30", 2.5),
        ("mo", "30", 2.5),
        ("weeks", "521.786", 10.0),
        ("wk", "521.786", 10.0),
        ("days", "3652.5", 10.0),
        ("d", "3652.5", 10.0),
    ],
)
def test_units_of_the_sidecar_are_turned_into_years(dataset, unit, value, years):
    folder = dataset(f"participant_id\tage\nsub-01\t{value}\n", {"age": {"Units": unit}})
    assert ages(read_people(folder))["sub-01"] == pytest.approx(years, abs=1e-4)


@pytest.mark.parametrize(
    ("unit", "years"),
    [
        ("years (rounded down)", 30), ("Years", 30), ("year(s)", 30), ("in years", 30),
        ("years old at scan", 30), ("yrs (rounded)", 30), ("Age in years", 30), ("y", 30),
        ("years, rounded to the nearest integer", 30), ("years (to 1 decimal place)", 30),
        ("years at time of MRI", 30), ("completed years", 30), ("years since birth", 30),
        ("Years; 89 and older top-coded", 30), ("month(s)", 2.5), ("months (rounded)", 2.5),
        ("Years. Participants older than 89 are coded 90", 30), ("years (self-reported)", 30),
        ("years (shifted for anonymization)", 30), ("calendar years", 30), ("Jahre", 30),
        ("years at the time of the first session", 30), ("ans", 30), ("años", 30), ("anni", 30),
        ("yr (rounded to the nearest half-year)", 30), ("years, jittered by up to 2", 30),
        ("years, computed from date of birth", 30), ("years of age", 30), ("Age (years)", 30),
        ("Alter in Jahren", 30), ("age_in_years", 30), ("mois", 2.5),
        ("years (range 18-90)", 30),
        ("years old", 30), ("years (18-65)", 30), ("years on the day of the scan", 30),
        ("Monate (gerundet)", 2.5), ("an\u0303os (redondeado)", 30),
    ],
)  # fmt: skip
def test_unit_is_read_by_words(dataset, unit, years):
    folder = dataset("participant_id\tage\nsub-01\t30\n", {"age": {"Units": unit}})
    assert ages(read_people(folder))["sub-01"] == years


@pytest.mark.parametrize(
    "unit",
    [
        "moons", "years or months", "light years", "half-years", "5-year bins", "years * 10",
        "decades", "gestational weeks", "years of education", "years since diagnosis",
        "log(years)", "years/10", "year of birth", "years - 50", "years-50", "birth year",
        "years (minus 50)", "years, mean-centered", "years in bins of 5", "years; infants: months",
        "month of scan", "days of life", "year (of birth)", "years from onset", "dog years", "years + 2", "years x 10",
    ],
)  # fmt: skip
def test_unknown_unit_is_refused(dataset, unit):
    folder = dataset("participant_id\tage\nsub-01\t3\n", {"age": {"Units": unit}})
    with pytest.raises(UserError, match=r"participants.json: Units .*years, months") as caught:
        read_people(folder)
    assert unit in str(caught.value)


NAMES_OF_SESSIONS = (
    ["session", "ses", "Session_ID", "SessionID", "session_id", "visit", "Wave", "time_point", "Timepoint", "VisitID"]
)


@pytest.mark.parametrize("name", NAMES_OF_SESSIONS)
@pytest.mark.parametrize("prefix", ["", "ses-"])
def test_rows_of_sessions_are_told_apart_whatever_their_column_is_called(dataset, name, prefix):
    people = read_people(
        dataset(f"participant_id\t{name}\tage\nsub-1\t{prefix}a\t30\nSUB-1\t{prefix}b\t32\n")
    )
    assert [people.find("sub-1", s).age for s in ("ses-a", "ses-b")] == [30, 32]


def test_rows_that_another_column_tells_apart_are_refused_with_the_way_out(dataset):
    folder = dataset("participant_id\tvisit\texam\tage\nsub-1\t1\ta\t30\nsub-1\t1\tb\t32\n")
    with pytest.raises(UserError, match="listed more than once: sub-1_ses-1.*session_id"):
        read_people(folder)


def test_a_session_column_of_single_rows_holds_for_any_session(dataset):
    people = read_people(dataset("participant_id\tsession\tage\nsub-1\t3\t30\nsub-2\t1\t31\n"))
    assert people.find("sub-1", "ses-a").age == people.find("sub-1").age == 30


def test_unit_in_the_columns_name_counts_without_sidecar(dataset):
    folder = dataset("participant_id\tage_months\nsub-01\t30\n")
    people = read_people(folder, age_column="age_months")
    assert ages(people)["sub-01"] == 2.5
    assert "months" in people.notes[0]


@pytest.mark.parametrize("name", ["age_months_at_scan", "Age (months)", "AgeMonths"])
def test_unit_inside_the_columns_name_counts(dataset, name):
    people = read_people(dataset(f"participant_id\t{name}\nsub-01\t30\n"), age_column=name)
    assert ages(people)["sub-01"] == 2.5


def test_lower_bound_is_taken_and_noted(dataset):
    people = read_people(dataset("participant_id\tage\nsub-01\t89+\nsub-02\t>89\nsub-03\t7\n"))
    assert people.table["age"].tolist() == [89, 89, 7]
    assert "sub-01 (89+), sub-02 (>89)" in people.notes[0]


@pytest.mark.parametrize("value", ["n/a", "", "NaN"])
def test_missing_age_is_left_out_with_reason(dataset, value):
    people = read_people(dataset(f"participant_id\tage\nsub-01\t{value}\nsub-02\t7\n"))
    assert np.isnan(ages(people)["sub-01"])
    assert list(people.left_out) == ["sub-01"]


@pytest.mark.parametrize("value", ["young", "-3", "999", "3O", "25,5", "12-15"])
def test_age_that_is_no_age_is_left_out_naming_value_and_file(dataset, value):
    people = read_people(dataset(f"participant_id\tage\nsub-01\t{value}\nsub-02\t7\n"))
    assert np.isnan(ages(people)["sub-01"])
    assert value in people.left_out["sub-01"] and "participants.tsv" in people.left_out["sub-01"]
    assert people.find("sub-01").reason == people.left_out["sub-01"]


def test_missing_age_column_lists_the_columns_and_the_flag(dataset):
    with pytest.raises(UserError, match=r"no column 'age'.*participant_id, iq.*--age-column"):
        read_people(dataset("participant_id\tiq\nsub-01\t100\n"))


def test_without_age_column_people_can_be_read_if_no_age_is_needed(dataset):
    people = read_people(
        dataset("participant_id\tsex\nsub-01\tF\n"), require_age=False, age_column="age"
    )
    assert people.find("sub-01").sex == "F" and np.isnan(people.find("sub-01").age)


def test_column_asked_for_by_name_must_be_there(dataset):
    folder = dataset("participant_id\tage\tsex\nsub-01\t3\tF\n")
    with pytest.raises(UserError, match=r"'clinic'.*--site-column"):
        read_people(folder, site_column="clinic")


@pytest.mark.parametrize("name", ["Site", "SITE", "site_id", "Scanner_Site", "centre", "Center"])
def test_usual_names_of_the_site_are_found(dataset, name):
    people = read_people(dataset(f"participant_id\tage\t{name}\nsub-01\t3\tNY\n"))
    assert people.find("sub-01").site == "NY"


@pytest.mark.parametrize("name", ["Sex", "SEX", "gender", "Gender"])
def test_usual_names_of_the_sex_are_found(dataset, name):
    people = read_people(dataset(f"participant_id\tage\t{name}\nsub-01\t3\tFemale\n"))
    assert people.find("sub-01").sex == "F"


def test_ambiguous_codes_of_the_sex_are_missing_and_noted(dataset):
    people = read_people(dataset("participant_id\tage\tsex\nsub-01\t3\t1\nsub-02\t3\tM\n"))
    assert people.table["sex"].tolist() == [None, "M"]
    assert "'1' (1)" in people.notes[0]


def test_levels_of_the_sidecar_explain_codes(dataset):
    folder = dataset(
        "participant_id\tage\tsex\nsub-01\t3\t1\nsub-02\t3\t2\n",
        {"sex": {"Levels": {"1": "male", "2": {"Description": "female"}}}},
    )
    assert read_people(folder).table["sex"].tolist() == ["M", "F"]


def test_age_of_a_session_goes_before_that_of_the_participant(dataset):
    people = read_people(
        dataset(
            "participant_id\tage\tsex\nsub-01\t30\tF\nsub-02\t40\tM\n",
            **{"01": "session_id\tage\nses-a\t31\nses-b\tn/a\n"},
        )
    )
    assert people.find("sub-01", "ses-a").age == 31
    assert people.find("sub-01", "ses-a").sex == "F"
    assert people.find("sub-01", "ses-b").age == 30
    assert people.find("sub-02", "ses-a").age == 40
    assert people.find("sub-03") is None


def test_sessions_sidecar_of_the_root_is_inherited(dataset):
    folder = dataset("participant_id\tage\nsub-01\tn/a\n", **{"01": "session_id\tage\nses-a\t30\n"})
    (folder / "sessions.json").write_text('{"age": {"Units": "months"}}')
    people = read_people(folder)
    assert people.find("sub-01", "ses-a").age == 2.5
    assert not people.left_out


def test_bad_age_of_a_session_costs_that_session_only(dataset):
    people = read_people(
        dataset(
            "participant_id\tage\nsub-01\t30\n",
            **{"01": "session_id\tage\nses-a\told\nses-b\t32\n"},
        )
    )
    assert "sub-01_sessions.tsv" in people.left_out["sub-01_ses-a"]
    assert np.isnan(people.find("sub-01", "ses-a").age)
    assert people.find("sub-01", "ses-b").age == 32


@pytest.mark.parametrize("damaged", ["", "session_id\tage\nses-a\n"])
def test_a_damaged_table_of_sessions_costs_its_own_ages(dataset, damaged):
    people = read_people(dataset("participant_id\tage\nsub-01\t30\nsub-02\t40\n", **{"01": damaged}))
    assert ages(people) == {"sub-01": 30, "sub-02": 40}
    assert any("sub-01_sessions.tsv" in note for note in people.notes)


def test_duplicate_rows_are_refused_by_name(dataset):
    folder = dataset("participant_id\tage\nsub-01\t3\nsub-02\t4\nsub-01\t3\n")
    with pytest.raises(UserError, match="more than once: sub-01. "):
        read_people(folder)


def test_participant_in_two_sites_is_refused_by_name(dataset):
    folder = dataset("participant_id\tage\tsite\nsub-01\t3\tA\nsub-01\t3\tB\n")
    with pytest.raises(UserError, match=r"more than one site: sub-01 \(A, B\)"):
        read_people(folder)


def test_truncated_line_is_refused_by_number(dataset):
    with pytest.raises(UserError, match=r"3 fields, but line 3 has 2"):
        read_people(dataset("participant_id\tsex\tage\nsub-01\tF\t3\nsub-02\tM"))


def test_no_participants_table_is_no_input(tmp_path):
    with pytest.raises(NoInputError, match="participants.tsv: not found"):
        read_people(tmp_path)
    assert len(read_people(tmp_path, require_age=False).table) == 0


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode("utf-8-sig").replace(b"\n", b"\r\n"),
        lambda text: text.encode("utf-16"),
        lambda text: text.encode("latin-1").replace(b"\n", b"\r"),
    ],
)
def test_encodings_and_line_ends_do_not_matter(dataset, encode):
    text = "participant_id\tage\tsite\nsub-01\t3\tBesançon\n"
    person = read_people(dataset(encode(text))).find("sub-01")
    assert (person.age, person.site) == (3, "Besançon")


def test_quotes_of_r_and_blank_lines_do_not_matter(dataset):
    people = read_people(dataset('"participant_id"\t"age"\n"01"\t3\n\n'))
    assert people.find("sub-01").age == 3


def test_real_dataset_is_read(shared_data):
    people = read_people(shared_data / "bids" / "ds002748-subset")
    assert len(people.table) == 12 and people.table["age"].between(19, 55).all()
    assert people.table["sex"].value_counts().to_dict() == {"F": 7, "M": 5}


def test_tables_of_sessions_of_others_are_left_alone(dataset):
    sessions = "session_id\tage\nses-1\t31\n"
    folder = dataset(
        "participant_id\tage\nsub-01\t30\nsub-02\t40\n", **{"01": sessions, "02": "damaged\t\n"}
    )
    people = read_people(folder, only="sub-01")
    assert people.find("sub-01", "ses-1").age == 31 and people.find("sub-02").age == 40


def test_levels_that_are_no_text_do_not_stop_the_reading(dataset):
    levels = {"1": ["male"], "2": 5, "3": {"Description": "female"}, "4": None}
    people = read_people(
        dataset(
            "participant_id\tage\tsex\nsub-01\t30\t3\nsub-02\t40\t1\n", {"sex": {"Levels": levels}}
        )
    )
    assert people.table["sex"].tolist() == ["F", "M"]


def test_table_that_ends_in_zeros_of_a_full_disk_is_refused(dataset):
    with pytest.raises(UserError, match="line 3 has 1"):
        read_people(dataset(b"participant_id\tage\nsub-01\t3\n" + bytes(100)))
