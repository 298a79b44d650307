"""Charts: what they show, and the same bytes each time."""

import pytest

from bids_varaug.reports.plots import FAMILY_COLORS, draw_volumes, pair_sides, short_name


def test_same_table_gives_the_same_bytes(members_table):
    assert draw_volumes(members_table) == draw_volumes(members_table)


def test_every_member_has_a_mark(members_table):
    moved = members_table.copy()
    moved.loc[moved["member"] == "seed02", "volume"] *= 1.2
    assert draw_volumes(members_table) != draw_volumes(moved)


def test_rounded_members_have_a_colour_of_their_own(members_table):
    assert len(set(FAMILY_COLORS.values())) == 3
    table = members_table.replace({"member": {"seed02": "rr01"}})
    rounded = table.assign(family=table["member"].str.rstrip("0123456789"))
    assert draw_volumes(rounded) != draw_volumes(table)


def test_one_member_alone_can_be_drawn(members_table):
    alone = members_table[members_table["member"] == "ieee"]
    assert draw_volumes(alone)[:4] == b"\x89PNG"


@pytest.mark.parametrize("zero", ["all", "mca01"])
def test_absent_structures_can_be_drawn(members_table, zero):
    table = members_table.copy()
    gone = (table["index"] == 17) & ((table["member"] == zero) | (zero == "all"))
    table.loc[gone, "volume"] = 0.0
    assert draw_volumes(table)[:4] == b"\x89PNG"


def test_dollar_signs_in_names_are_no_formulas(members_table):
    table = members_table.assign(name=r"$\frac{")
    assert draw_volumes(table)[:4] == b"\x89PNG"


def test_right_structures_follow_their_left_ones():
    assert pair_sides(["Left-A", "Brain-Stem", "Right-A"]) == ["Left-A", "Right-A", "Brain-Stem"]


def test_side_stands_behind_the_name():
    assert short_name("Right-Inf-Lat-Vent") == "Inf Lat Vent  R" and short_name("Brain-Stem") == "Brain Stem"
