"""Participants chosen by a condition on further columns."""

import pytest

from bids_varaug.errors import UsageError
from bids_varaug.inputs.tables import TableError, participants_where, read_variables

TABLE = """participant_id\tage\tgroup\tscan date\tIQ
01\t20\tTD\t2001\t100
sub-02\t30.5\tASD\tn/a\tn/a
03\t40\tTD\t2003\tlow
03\t41\tASD\t2004\t90
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "participants.tsv"
    path.write_text(TABLE)
    return path


def test_columns_of_numbers_are_numbers_and_ids_have_their_prefix(table):
    variables = read_variables(table)
    assert list(variables.index) == ["sub-01", "sub-02", "sub-03", "sub-03"]
    assert variables["age"].tolist() == [20, 30.5, 40, 41] and variables["IQ"].tolist()[2:] == ["low", "90"]
    table.write_text("participant_id\tx\n\t1\n")
    with pytest.raises(TableError, match="line 2"):
        read_variables(table)


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ("group == 'TD'", ["sub-01", "sub-03"]),
        ("age > 30 and group != 'TD'", ["sub-02", "sub-03"]),
        ("`scan date` >= 2003", ["sub-03"]),
        ("group in ['ASD']", ["sub-02", "sub-03"]),
        ("participant_id == '01'", ["sub-01"]),
        ("group == 'other'", []),
    ],
)
def test_participants_of_whom_a_row_fulfils_it_are_kept(table, condition, kept):
    assert participants_where([table], condition) == kept


def test_the_first_table_that_has_the_columns_is_asked(table, tmp_path):
    other = tmp_path / "features.csv"
    other.write_text("Subject,scanner\n7,A\n8,B\n")
    assert participants_where([table, other], "scanner == 'B'") == ["sub-8"]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("grop == 'TD'", "'grop' is not defined. It has: participant_id, age, group"),
        ("group = 'TD'", "no condition|cannot be applied"),
        ("group ==", "cannot be applied.*such as"),
        ("age > 'old'", "cannot be applied"),
        ("age + 1", "no condition"),
        ("1 == 1", "no condition"),
        ("@x > 1", "not defined"),
        ("", "cannot be applied"),
    ],
)
def test_what_is_no_condition_is_explained(table, condition, message):
    with pytest.raises(UsageError, match=message):
        participants_where([table], condition)


def test_without_tables_there_is_nothing_to_ask():
    with pytest.raises(UsageError, match="no participants.tsv"):
        participants_where([], "age > 1")
