"""Ids that two tables spell differently."""

import pytest

from bids_varaug.brainage.features_table import read_features_table
from bids_varaug.brainage.repeated_runs import read_repeated_runs
from bids_varaug.errors import UserError
from bids_varaug.inputs.participants import read_people


@pytest.fixture
def read(tmp_path):
    """Read a table of features with these ids beside a participants.tsv with those."""

    def read(here, there=("sub-001", "sub-002", "sub-003"), sessions=(None, None)):
        for name, ids, label in (
            ("features", here, sessions[0]),
            ("participants", there, sessions[1]),
        ):
            column = "x" if name == "features" else "age"
            header = "participant_id\t" + ("session_id\t" if label else "")
            lines = [
                f"{who}\t" + (f"{label}\t" if label else "") + str(30 + 10 * n)
                for n, who in enumerate(ids)
            ]
            (tmp_path / f"{name}.tsv").write_text(header + column + "\n" + "\n".join(lines) + "\n")
        return read_features_table(tmp_path / "features.tsv", read_people(tmp_path))

    return read


@pytest.mark.parametrize(
    "spelled",
    ["{}", "0{}", "sub-{}", "SUB-0{}", "sub-00{}_T1w.nii.gz", "00{}_T1w.nii.gz", "00{}.nii.gz",
     "/data/sub-00{}/anat/sub-00{}_T1w.nii.gz", "sub-00{}_ses-1_T1w.nii", "00{}.long.00{}_template",
     "sub-00{}_ses-a.long.sub-00{}", "000{}.mgz", "{}.0", "sub0{}",
     "Subj_00{}", "subject-{}", "0{}_MR1",
     "sub-0{}_MR2_T1w.nii"],
)  # fmt: skip
def test_one_to_one_spellings_are_matched_with_a_note(read, spelled):
    cohort = read([spelled.replace("{}", str(n)) for n in (1, 2, 3)])
    assert cohort.people["participant_id"].tolist() == ["sub-001", "sub-002", "sub-003"]
    assert cohort.age.tolist() == [30, 40, 50] and not cohort.left_out
    note = next(note for note in cohort.source["notes"] if "spell" in note)
    assert "3 label(s)" in note and "sub-001 there" in note and "1" in note
    assert "features.tsv" in note and "participants.tsv" in note


def test_the_same_spelling_needs_no_note(read):
    assert read(["001", "sub-002", "sub-003"]).source["notes"] == []


@pytest.mark.parametrize(
    ("here", "there", "message"),
    [
        (["1", "2"], ["sub-01", "sub-001", "sub-2"], "sub-1 here is sub-01 or sub-001 there"),
        (["1", "01"], ["sub-001", "sub-2"], "sub-1 and sub-01 here are sub-001 there"),
        (
            ["sub-1_ses-a", "sub-1_ses-b"],
            ["sub-1", "sub-2"],
            "sub-1_ses-a and sub-1_ses-b here are",
        ),
        (["01_MR1", "01_MR2"], ["sub-01", "sub-02"], "sub-01_MR1 and sub-01_MR2 here are sub-01 "),
        (["1", "01"], ["sub-01", "sub-2"], "sub-1 and sub-01 here are sub-01 there"),
    ],
)
def test_what_may_be_several_people_is_refused_with_both_sides(read, here, there, message):
    with pytest.raises(UserError, match=f"Did you mean that.*{message}.*the same way"):
        read(here, there)


def test_people_who_differ_in_zeros_alone_stay_apart(read):
    cohort = read(["1", "01", "2"], ["sub-1", "sub-01", "sub-2"])
    assert cohort.age.tolist() == [30, 40, 50] and cohort.source["notes"] == []


def test_labels_that_only_begin_alike_stay_apart(read):
    cohort = read(["A_1", "A_2", "A_3"], ["A_1", "A_2"])
    assert len(cohort) == 2 and list(cohort.left_out) == ["sub-A_3"]


@pytest.mark.parametrize(
    ("here", "guess"),
    [
        (["ctrl01x", "ctrl02x"], "Did you mean that sub-ctrl01x is sub-001?"),
        (["001xyz"], "Did you mean that sub-001xyz is sub-001?"),
        (["A", "B"], "sub-003). Write"),
    ],
)
def test_tables_of_different_people_show_both_sides(read, here, guess):
    with pytest.raises(UserError, match="nobody is left.*No participant of features.tsv") as caught:
        read(here)
    message = str(caught.value)
    assert guess in message
    assert "sub-" + here[-1] in message and "(sub-001, sub-002, sub-003)" in message


def test_people_without_a_counterpart_are_left_out_beside_matched_ones(read):
    cohort = read(["1", "2", "99"])
    assert len(cohort) == 2 and {"sub-99", "sub-003"} == set(cohort.left_out)


def test_sessions_are_matched_too(read):
    cohort = read(["1", "2"], ["sub-1", "sub-2"], sessions=("1", "ses-01"))
    assert cohort.age.tolist() == [30, 40]
    assert "ses-1 here is ses-01 there" in cohort.source["notes"][0]


def test_a_person_spelled_in_two_ways_in_a_table_of_runs_is_refused(tmp_path):
    lines = "1\ta\t1\n1\tb\t2\nsub-01\tc\t3\n2\ta\t4\n2\tb\t5\n"
    (tmp_path / "runs.tsv").write_text("participant_id\tmember\tHip\n" + lines)
    with pytest.raises(UserError, match="1 and sub-01: one person in two spellings"):
        read_repeated_runs(tmp_path / "runs.tsv")
