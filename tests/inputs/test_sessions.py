"""Sessions in the order of their dates; by label, without days, where a date is missing."""

import math

import pytest

from bids_varaug.inputs.participants import order_sessions

SESSIONS = ["ses-1", "ses-2", "ses-10"]


def write(root, name, *lines):
    path = root / "sub-01" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def test_dates_of_the_table_of_sessions_decide(tmp_path):
    write(tmp_path, "sub-01_sessions.tsv", "session_id\tacq_time", "ses-10\t1850-01-01T00:00:00",
          "1\t1850-01-03T12:00:00.5Z", "ses-2\t1850-01-02")  # fmt: skip
    days = order_sessions(tmp_path, "sub-01", SESSIONS)
    assert list(days) == ["ses-10", "ses-2", "ses-1"]
    assert list(days.values()) == pytest.approx([0, 1, 2.5], abs=1e-4)


def test_dates_of_the_scans_fill_in_and_only_those_of_t1w_images_count(tmp_path):
    write(
        tmp_path, "sub-01_sessions.tsv", "session_id\tacq_time", "ses-1\t2001-01-05", "ses-2\tn/a", "ses-10\t2001-01-04"
    )
    write(tmp_path, "ses-2/sub-01_ses-2_scans.tsv", "filename\tacq_time", "anat/sub-01_ses-2_T1w.nii.gz\t2001-01-06",
          "func/sub-01_ses-2_bold.nii.gz\t1999-01-01")  # fmt: skip
    assert list(order_sessions(tmp_path, "sub-01", SESSIONS)) == ["ses-10", "ses-1", "ses-2"]


@pytest.mark.parametrize("wrong", ["n/a", "9/20/01", "yesterday"])
def test_a_missing_date_is_not_guessed(tmp_path, wrong):
    write(
        tmp_path,
        "sub-01_sessions.tsv",
        "session_id\tacq_time",
        "ses-10\t2001-01-01",
        "ses-2\t2001-01-02",
        f"ses-1\t{wrong}",
    )
    days = order_sessions(tmp_path, "sub-01", SESSIONS)
    assert list(days) == SESSIONS and all(map(math.isnan, days.values()))


def test_two_dates_of_one_session_are_none(tmp_path):
    write(tmp_path, "sub-01_sessions.tsv", "session_id\tacq_time", "ses-10\t2001-01-01", "ses-2\t2001-01-02",
          "ses-1\t2001-01-03", "ses-1\t2002-01-03")  # fmt: skip
    assert list(order_sessions(tmp_path, "sub-01", SESSIONS)) == SESSIONS


def test_no_table_and_a_damaged_one_are_no_error(tmp_path):
    assert list(order_sessions(tmp_path, "sub-01", SESSIONS[::-1])) == SESSIONS
    write(tmp_path, "sub-01_sessions.tsv", "session_id\tacq_time", "ses-1\t1\t2")
    assert list(order_sessions(tmp_path, "sub-01", SESSIONS)) == SESSIONS
