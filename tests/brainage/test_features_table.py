import json

import numpy as np
import pandas as pd
import pytest

from bids_varaug.brainage.cohort import CohortError
from bids_varaug.brainage.features_table import read_features_table
from bids_varaug.errors import UserError
from bids_varaug.inputs.participants import People, read_people


@pytest.fixture
def table(tmp_path):
    """Write a table; returns its path."""

    def write(text, name="features.tsv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def people(tmp_path):
    (tmp_path / "participants.tsv").write_text(
        "participant_id\tage\tsex\tsite\nsub-1\t30\tF\tA\nsub-2\t40\tM\tB\nsub-3\tn/a\tM\tB\n"
    )
    return read_people(tmp_path)


def rows(*lines, header="participant_id\tage\tx\ty"):
    return "\n".join([header, *lines]) + "\n"


def test_numbers_are_features_and_people_come_from_the_table(table):
    header = "Subject_ID\tAge\tSEX\tscanner\tx\ty"
    path = table(rows("sub-1\t30\tF\tA\t1.5\t2", "2\t40\tm\tB\t3\t4.25", header=header))
    cohort = read_features_table(path)
    assert cohort.people.to_dict("list") == {
        "participant_id": ["sub-1", "sub-2"],
        "session_id": [None, None],
        "observation": ["sub-1", "sub-2"],
        "age": [30.0, 40.0],
        "sex": ["F", "M"],
        "site": ["A", "B"],
    }
    assert cohort.names == ("x", "y") and cohort.members is None
    assert cohort.baseline.tolist() == [[1.5, 2], [3, 4.25]]
    assert cohort.source["table"] == "features.tsv"
    json.dumps(cohort.source)


def test_people_of_participants_tsv_fill_in(table, people):
    path = table(rows("1\t1\t2", "2\t3\t4", "3\t5\t6", "04\t5\t7", header="participant_id\tx\ty"))
    cohort = read_features_table(path, people)
    assert cohort.age.tolist() == [30, 40]
    assert cohort.people["sex"].tolist() == ["F", "M"]
    assert "participants.tsv" in cohort.left_out["sub-3"]
    assert "not in participants.tsv" in cohort.left_out["sub-04"]


def test_people_who_are_not_in_the_table_are_listed(table, people):
    path = table(rows("2\t3\t4", header="participant_id\tx\ty"))
    assert read_features_table(path, people).left_out["sub-1"] == "not in the table"


def test_age_of_the_table_goes_before_participants_tsv(table, people):
    cohort = read_features_table(table(rows("1\t31\t1\t2", "2\t41\t3\t4")), people)
    assert cohort.age.tolist() == [31, 41]
    assert cohort.people["site"].tolist() == ["A", "B"]


def test_members_sessions_and_runs_are_told_apart_in_any_order(table):
    header = "participant_id\tsession_id\trun\tmember\tage\tx"
    lines = [
        f"{p}\t{s}\t{r}\t{m}\t{20 + p}\t{1000 * p + 100 * s + 10 * r + k}"
        for p in (1, 2)
        for s in (1, 2)
        for r in (1, 2)
        for k, m in enumerate(("ieee", "mca01", "seed01"))
    ]
    shuffled = [lines[i] for i in np.random.default_rng(0).permutation(len(lines))]
    for given in (lines, shuffled):
        cohort = read_features_table(table(rows(*given, header=header)))
        order = np.argsort(cohort.people["observation"].to_numpy(str))
        assert cohort.people["observation"][order[1]] == "sub-1_ses-1_run-2"
        np.testing.assert_array_equal(
            cohort.baseline[order, 0], [1110, 1120, 1210, 1220, 2110, 2120, 2210, 2220]
        )
        at = [cohort.member_ids.index(m) for m in ("mca01", "seed01")]
        np.testing.assert_array_equal(
            cohort.members[:, at, 0] - cohort.baseline, [[1, 2]] * 8
        )  # fmt: skip
        assert len(np.unique(cohort.groups)) == 2


def test_who_lacks_members_is_listed(table):
    header = "participant_id\tage\tmember\tx"
    lines = [f"{p}\t{20 + p}\t{m}\t{p}{k}" for p in (1, 2, 3) for k, m in enumerate("abc")]
    cohort = read_features_table(table(rows(*lines[:-1], header=header)))
    assert len(cohort) == 2 and "c" in cohort.left_out["sub-3"]
    np.testing.assert_allclose(cohort.baseline, cohort.members.mean(axis=1))


def test_constant_and_missing_features_are_dropped_with_a_note(table):
    path = table(
        rows("1\t30\t1\t7\tn/a\t1", "2\t40\t3\t7\tn/a\t2", header="participant_id\tage\tx\tc\te\ty")
    )
    cohort = read_features_table(path)
    assert cohort.names == ("x", "y")
    assert cohort.source["dropped_features"] == {
        "e": "missing in 2 of 2 observations",
        "c": "always 7",
    }


def test_only_constant_features_are_an_error(table):
    with pytest.raises(CohortError, match="no feature is left.*x: always 1"):
        read_features_table(table(rows("1\t30\t1\t2", "2\t40\t1\t2")))


def people_of_two_features():
    """Lines of 20 people with x and y, whole numbers that have nothing to do with their ages."""
    return [f"{p}\t{20 + p}\t{37 * p % 101}\t{53 * p % 97}" for p in range(1, 21)]


def test_single_missing_values_leave_the_observation_out(table):
    lines = people_of_two_features()
    lines[4] = "5\t25\tn/a\t10"
    lines[5] = "6\t26\tinf\t10"
    cohort = read_features_table(table(rows(*lines)))
    assert len(cohort) == 18 and cohort.names == ("x", "y")
    assert cohort.left_out == {"sub-5": "no value of x", "sub-6": "no value of x"}


def test_text_in_a_column_of_numbers_is_missing_and_noted(table):
    lines = people_of_two_features()
    lines[4] = "5\t25\tbroken\t10"
    cohort = read_features_table(table(rows(*lines)))
    assert list(cohort.left_out) == ["sub-5"]
    assert "'broken'" in cohort.source["notes"][0]


def test_columns_of_text_and_of_the_person_are_ignored_with_a_note(table):
    header = "participant_id\tage\tgroup\tage_at_scan\tIQ\tsite_code\tpatient\tx"
    path = table(
        rows("1\t30\tASD\t30\t99\t1\tTrue\t1", "2\t40\tTD\t40\t101\t2\tFalse\t2", header=header)
    )
    cohort = read_features_table(path)
    assert cohort.names == ("x",)
    assert set(cohort.source["ignored_columns"]) == {
        "group", "age_at_scan", "IQ", "site_code", "patient",
    }  # fmt: skip


def test_duplicate_rows_are_refused_by_name(table):
    with pytest.raises(UserError, match=r"more than one row of: sub-2\. "):
        read_features_table(table(rows("1\t30\t1\t2", "2\t40\t1\t3", "sub-2\t40\t5\t2")))


def test_duplicate_members_are_refused_by_name(table):
    header = "participant_id\tmember\tage\tx"
    with pytest.raises(UserError, match="more than one row of: sub-1 member a"):
        read_features_table(table(rows("1\ta\t3\t1", "1\tb\t3\t2", "1\ta\t3\t3", header=header)))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("site", "AB", r"more than one site.*sub-1 \(A, B\)"),
        ("sex", "FM", r"more than one sex.*sub-1 \(F, M\)"),
    ],
)
def test_participant_in_two_sites_is_refused_by_name(table, column, values, message):
    header = f"participant_id\tsession_id\tage\t{column}\tx"
    lines = [f"1\t{s}\t30\t{value}\t{s}" for s, value in enumerate(values)]
    with pytest.raises(UserError, match=message):
        read_features_table(table(rows(*lines, header=header)))


def test_two_ages_in_one_session_are_refused_and_of_two_sessions_are_not(table):
    lines = ["1\ta\t1\t30\t1", "1\ta\t2\t31\t2"]
    header = "participant_id\tsession_id\trun\tage\tx"
    assert len(read_features_table(table(rows(*lines, header=header)))) == 2
    header = "participant_id\tsession_id\tmember\tage\tx"
    with pytest.raises(UserError, match=r"more than one age.*sub-1 \(30, 31\)"):
        read_features_table(table(rows(*lines, header=header)))
    same = [line.replace("31", "30.0") for line in lines]
    assert read_features_table(table(rows(*same, header=header))).age.tolist() == [30]


def test_ages_that_are_no_numbers_are_listed(table):
    cohort = read_features_table(
        table(rows("1\tyoung\t1\t2", "2\t40\t1\t2", "3\tn/a\t1\t4", "4\t89+\t2\t5"))
    )
    assert cohort.age.tolist() == [40, 89]
    assert "'young'" in cohort.left_out["sub-1"] and "n/a" in cohort.left_out["sub-3"]
    assert "89+" in cohort.source["notes"][0]


def test_sidecar_of_the_table_gives_the_unit_of_ages(table, tmp_path):
    (tmp_path / "features.json").write_text('{"age": {"Units": "months"}}')
    cohort = read_features_table(table(rows("1\t30\t1\t2", "2\t36\t3\t4")))
    assert cohort.age.tolist() == [2.5, 3]


def test_no_ages_anywhere_lists_columns_and_flag(table):
    with pytest.raises(UserError, match="no column 'age'.*participant_id, x.*--age-column"):
        read_features_table(table(rows("1\t2", header="participant_id\tx")))


def test_new_people_without_age_are_read_for_a_model(table):
    path = table(rows("1\t2\t5\t7", header="participant_id\tx\ty\tz"))
    cohort = read_features_table(path, features=["z", "x"], require_age=False)
    assert cohort.names == ("z", "x") and cohort.baseline.tolist() == [[7, 2]]
    with pytest.raises(CohortError, match="2 of its 3 features.*missing: p, q"):
        read_features_table(path, features=["p", "x", "q"], require_age=False)


def test_a_model_without_people_needs_no_people(table):
    empty = People(pd.DataFrame(columns=["participant_id", "session_id", "age", "sex", "site"]))
    path = table(rows("1\t2", header="participant_id\tx"))
    assert len(read_features_table(path, empty, features=["x"], require_age=False)) == 1


@pytest.mark.parametrize(
    ("last", "fields"), [("3\t50\t1", 3), ("3", 1), ("3\t50\t1\t2\t9", 5), ("3\t50\t1\t2\t9\t9", 6)]
)
def test_truncated_table_is_refused_by_line(table, last, fields):
    with pytest.raises(UserError, match=f"header has 4 fields, but line 4 has {fields}"):
        read_features_table(table(rows("1\t30\t1\t2", "2\t40\t3\t4", last)))


def test_lines_that_are_too_long_and_too_short_are_refused(table):
    with pytest.raises(UserError, match="damaged"):
        read_features_table(table(rows("1\t30\t1\t2", "2\t40\t3\t4\t5", "3\t50\t1")))
    with pytest.raises(UserError, match="damaged"):
        read_features_table(table(rows("1\t30\t1\t2\t3", "2\t40\t3\t4", "3\t50\t1")))


@pytest.mark.parametrize("content", [b"", b"\n", b"participant_id\tage\tx\n"])
def test_empty_table_is_an_error(table, content):
    with pytest.raises(UserError, match="empty|no rows"):
        read_features_table(table(content))


def test_missing_ids_columns_and_separators_are_told(table):
    with pytest.raises(UserError, match="no column 'participant_id'"):
        read_features_table(table(rows("1\t2", header="age\tx")))
    with pytest.raises(UserError, match="no participant in line 3"):
        read_features_table(table(rows("1\t30\t1\t2", "n/a\t30\t1\t2")))
    with pytest.raises(UserError, match="separated by ','"):
        read_features_table(table("participant_id,age,x\n1,30,2\n"))
    with pytest.raises(UserError, match="column x appears twice"):
        read_features_table(table(rows("1\t30\t1\t2", header="participant_id\tage\tx\tx")))


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode("utf-8-sig").replace(b"\n", b"\r\n"),
        lambda text: text.encode("latin-1"),
        lambda text: text.encode("utf-16"),
        lambda text: text.encode().replace(b"\n", b"\r"),
        lambda text: text.rstrip("\n").encode(),
        lambda text: (text + "\n\n").encode(),
    ],
)
def test_encodings_and_line_ends_do_not_matter(table, encode):
    text = rows("1\t30\tBesançon\t2", "2\t40\tBesançon\t4", header="participant_id\tage\tsite\tx")
    cohort = read_features_table(table(encode(text)))
    assert cohort.people["site"].tolist() == ["Besançon"] * 2
    assert cohort.baseline.tolist() == [[2], [4]]


def test_comma_separated_and_freesurfers_tables_are_read(table, people):
    cohort = read_features_table(table("participant_id,age,x\n1,30,2\n2,40,3\n", "features.csv"))
    assert cohort.baseline.tolist() == [[2], [3]]
    path = table("Measure:volume\tLeft-Thalamus\nsub-1\t7000.5\nsub-2\t8000\n", "aseg.tsv")
    assert read_features_table(path, people).baseline.tolist() == [[7000.5], [8000]]


def test_numbers_are_read_to_the_last_bit(table):
    values = np.random.default_rng(0).lognormal(8, 3, 50)
    lines = [f"{p}\t{30 + p}\t{value!r}\t{p}" for p, value in enumerate(values.tolist())]
    cohort = read_features_table(table(rows(*lines)))
    assert np.array_equal(cohort.baseline[:, 0], values)


@pytest.mark.parametrize(
    ("name", "people", "features", "dropped"),
    [
        ("fcon1000_freesurfer.tsv", 1078, 214, 4),
        ("abide_males_freesurfer.tsv", 915, 419, 0),
        ("ixi_freesurfer_thickness.tsv", 556, 72, 0),
    ],
)
def test_public_tables_are_read(shared_data, name, people, features, dropped):
    cohort = read_features_table(shared_data / "brain_age" / name)
    assert cohort.baseline.shape == (people, features)
    assert len(cohort.source["dropped_features"]) == dropped
    assert not cohort.left_out and cohort.people["sex"].notna().all()
