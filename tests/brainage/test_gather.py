import json
import re

import numpy as np
import pytest

from bids_varaug.brainage.cohort import CohortError
from bids_varaug.brainage.gather import gather_cohort
from bids_varaug.derivatives.io import ENDING
from bids_varaug.derivatives.provenance import MixedDerivativesError
from bids_varaug.derivatives.sidecars import SLOPPY_NOTE
from bids_varaug.errors import NoInputError, UserError
from bids_varaug.inputs.participants import People, read_people

STRUCTURES = ((17, "Left-Hippocampus"), (53, "Right-Hippocampus"), (14, "3rd-Ventricle"))
MEMBERS = ("ieee", "mca01", "mca02", "rr01")


def family(member):
    return member.rstrip("0123456789")


def volume(person, member, structure):
    """Different for everybody, so that a mix-up would be seen."""
    return 1000 * person + 10 * MEMBERS.index(member) + structure


def stamp(sha="sha", members=None, name="aseg31"):
    digests = {member: f"{sha}-{member}" for member in members or MEMBERS}
    return {"Name": name, "Version": "0.1.0", "SHA256": digests}


class Derivatives:
    """Output directory and dataset, written by hand; persons 1, 2, ... of age 20 + person."""

    def __init__(self, root):
        self.root = root
        self.describe()
        for person in (1, 2, 3):
            self.add(person)
        self.people("participant_id\tage\n" + "".join(f"sub-{p}\t{20 + p}\n" for p in (1, 2, 3)))

    def describe(self, members=MEMBERS, versions=("0.1.0",), **more):
        made = [{"Name": "bids_varaug", "Version": version, **more} for version in versions]
        (self.root / "dataset_description.json").write_text(json.dumps({"GeneratedBy": made}))
        rows = [f"desc-{m}\tx\t{family(m)}\t0\tn/a\tsha-{m}\n" for m in members]
        (self.root / "descriptions.tsv").write_text(
            "desc_id\tdescription\tfamily\tseed\tprecision\tsha256\n"
            + "".join(rows)
            + "desc-brain\tx\tn/a\tn/a\tn/a\tn/a\n"
        )

    def people(self, text):
        (self.root / "participants.tsv").write_text(text)

    def path(self, person, session=None, run=None):
        entities = [f"sub-{person}"] + ([session] if session else [])
        folder = self.root.joinpath(*entities, "anat")
        folder.mkdir(parents=True, exist_ok=True)
        return folder / ("_".join(entities + ([run] if run else [])) + ENDING)

    def add(
        self, person, session=None, run=None, members=MEMBERS, structures=STRUCTURES, **sidecar
    ):
        rows = [
            f"{m}\t{family(m)}\t{index}\t{name}\t{volume(person, m, k)}\n"
            for m in members
            for k, (index, name) in enumerate(structures)
        ]
        path = self.path(person, session, run)
        path.write_text("member\tfamily\tindex\tname\tvolume\n" + "".join(rows))
        content = {"Members": list(members), "Ensemble": stamp(members=members), **sidecar}
        path.with_suffix(".json").write_text(json.dumps(content))
        return path

    def gather(self, **options):
        return gather_cohort(self.root, read_people(self.root), **options)


@pytest.fixture
def derivatives(tmp_path):
    return Derivatives(tmp_path)


def test_volumes_ages_and_source_are_gathered(derivatives):
    cohort = derivatives.gather()
    assert cohort.people["observation"].tolist() == ["sub-1", "sub-2", "sub-3"]
    assert cohort.age.tolist() == [21, 22, 23]
    assert cohort.names == tuple(name for _, name in STRUCTURES)
    assert cohort.member_ids == ("mca01", "mca02", "rr01")
    assert cohort.baseline[1].tolist() == [2000, 2001, 2002]
    assert cohort.members[1].tolist() == [[2000 + 10 * m + k for k in range(3)] for m in (1, 2, 3)]
    assert cohort.unit == "mm3" and not cohort.left_out
    source = cohort.source
    assert source["families"] == {"mca": ["mca01", "mca02"], "rr": ["rr01"]}
    assert (source["ensemble"], source["bids_varaug"]) == ("aseg31", "0.1.0")
    assert source["sha256"]["mca01"] == "sha-mca01"
    json.dumps(source)  # for models and reports


def test_sessions_and_runs_are_observations_of_one_participant(derivatives):
    derivatives.add(4, "ses-b", "run-2")
    derivatives.add(4, "ses-a")
    derivatives.people("participant_id\tage\nsub-1\t21\nsub-4\t40\n")
    (derivatives.root / "sub-4" / "sub-4_sessions.tsv").write_text("session_id\tage\nses-b\t42\n")
    cohort = derivatives.gather()
    assert cohort.people["observation"].tolist() == ["sub-1", "sub-4_ses-a", "sub-4_ses-b_run-2"]
    assert cohort.people["session_id"].tolist() == [None, "ses-a", "ses-b"]
    assert cohort.age.tolist() == [21, 40, 42]
    assert cohort.groups.tolist() == [0, 1, 1]


def test_ids_that_participants_tsv_pads_with_zeros_are_matched_and_noted(derivatives):
    derivatives.people(
        "participant_id\tage\n" + "".join(f"sub-00{p}\t{20 + p}\n" for p in (1, 2, 3))
    )
    cohort = derivatives.gather()
    assert cohort.people["participant_id"].tolist() == ["sub-1", "sub-2", "sub-3"]
    assert cohort.age.tolist() == [21, 22, 23] and not cohort.left_out
    assert "sub-1 here is sub-001 there" in cohort.source["notes"][0]
    derivatives.people("participant_id\tage\nsub-01\t21\nsub-001\t22\nsub-2\t3\n")
    with pytest.raises(UserError, match="sub-1 here is sub-01 or sub-001 there"):
        derivatives.gather()


def test_people_without_age_without_row_and_without_image_are_listed(derivatives):
    derivatives.people("participant_id\tage\nsub-1\t21\nsub-2\tn/a\nsub-9\t50\n")
    cohort = derivatives.gather()
    assert cohort.people["participant_id"].tolist() == ["sub-1"]
    assert "n/a" in cohort.left_out["sub-2"]
    assert "not in participants.tsv" in cohort.left_out["sub-3"]
    assert "participant level" in cohort.left_out["sub-9"]


def test_age_that_is_no_number_is_listed_with_value_and_file(derivatives):
    derivatives.people("participant_id\tage\nsub-1\t21\nsub-2\tyoung\nsub-3\t23\n")
    reason = derivatives.gather().left_out["sub-2"]
    assert "'young'" in reason and "participants.tsv" in reason


def test_everybody_stays_where_no_age_is_needed(derivatives):
    (derivatives.root / "participants.tsv").unlink()
    people = read_people(derivatives.root, require_age=False)
    cohort = gather_cohort(derivatives.root, people, require_age=False)
    assert len(cohort) == 3 and np.isnan(cohort.age).all() and not cohort.left_out


def test_who_lacks_members_is_listed_and_the_others_go_on(derivatives):
    derivatives.add(2, members=MEMBERS[:2])
    cohort = derivatives.gather()
    assert cohort.people["participant_id"].tolist() == ["sub-1", "sub-3"]
    assert "mca02, rr01" in cohort.left_out["sub-2"]


def test_members_that_few_have_are_not_used(derivatives):
    for person in (1, 2):
        derivatives.add(person, members=MEMBERS[:3])
    cohort = derivatives.gather()
    assert cohort.member_ids == ("mca01", "mca02") and len(cohort) == 3
    assert cohort.source["unused_members"] == ["rr01"]


def test_order_of_members_in_a_file_does_not_matter(derivatives):
    expected = derivatives.gather().members
    derivatives.add(2, members=MEMBERS[::-1])
    assert np.array_equal(derivatives.gather().members, expected)


def test_without_baseline_the_members_mean_takes_its_place(derivatives):
    for person in (1, 2, 3):
        derivatives.add(person, members=MEMBERS[1:])
    cohort = derivatives.gather()
    np.testing.assert_allclose(cohort.baseline, cohort.members.mean(axis=1))
    assert cohort.source["baseline"] == "mean of the members"


def test_one_member_alone_has_no_spread(derivatives):
    for person in (1, 2, 3):
        derivatives.add(person, members=MEMBERS[:1])
    cohort = derivatives.gather()
    assert cohort.members is None and cohort.member_ids == ()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-3], "truncated: its last line has no end"),
        (lambda data: data[: data.index(b"mca02")], "truncated: of the members.*mca02, rr01"),
        (lambda data: data[: data.index(b"rr01\trr\t53")], r"truncated.*of ieee 3, of rr01 1 rows"),
        (lambda data: data[:-6] + b"\n", "line 13 has 4 fields, not 5"),
        (lambda data: b"", "is empty"),
        (lambda data: b"<html>\n", "lacks the columns"),
        (lambda data: data.replace(b"\t2010", b"\tmuch"), "no number"),
        (lambda data: data.replace(b"\t2010", b"\tn/a"), "no number"),
        (lambda data: data.replace(b"\t2010", b"\t-1"), "negative"),
        (lambda data: data.replace(b"\t2010", b"\tnan"), "missing, negative or infinite"),
        (lambda data: data.replace(b"mca02", b"mca01"), "of ieee 3, of mca01 6 rows"),
        (lambda data: data.replace(b"\t53\t", b"\tx\t"), "cannot be read"),
        (lambda data: b"/annex/objects/MD5E-s1--x\n", "datalad get"),
        (lambda data: data.replace(b"ieee\tieee\t17", b"ieee\tieee\n17"), "line 2 has 2 fields"),
    ],
)
def test_damaged_table_is_listed_and_the_others_go_on(derivatives, damage, reason):
    path = derivatives.path(2)
    path.write_bytes(damage(path.read_bytes()))
    cohort = derivatives.gather()
    assert cohort.people["participant_id"].tolist() == ["sub-1", "sub-3"]
    assert re.search(reason, cohort.left_out["sub-2"])


def test_lost_structures_are_listed_without_sidecar_too(derivatives):
    derivatives.add(2, structures=STRUCTURES[:2]).with_suffix(".json").unlink()
    assert "3rd-Ventricle" in derivatives.gather().left_out["sub-2"]


def test_file_in_anothers_folder_is_listed(derivatives):
    path = derivatives.path(2)
    path.rename(path.with_name(path.name.replace("sub-2", "sub-1")))
    cohort = derivatives.gather()
    assert cohort.people["observation"].tolist() == ["sub-1", "sub-3"]
    assert any("folder of sub-2" in reason for reason in cohort.left_out.values())


def test_dangling_link_is_listed(derivatives):
    path = derivatives.path(2)
    path.unlink()
    path.symlink_to("nowhere")
    assert "cannot be read" in derivatives.gather().left_out["sub-2"]


def test_damaged_sidecar_is_listed(derivatives):
    derivatives.path(2).with_suffix(".json").write_text('{"Members": ')
    assert "sidecar is damaged" in derivatives.gather().left_out["sub-2"]


def test_windows_line_ends_do_not_matter(derivatives):
    expected = derivatives.gather().members
    path = derivatives.path(2)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert np.array_equal(derivatives.gather().members, expected)


def test_structure_that_nobody_has_is_dropped_with_a_note(derivatives):
    for person in (1, 2, 3):
        path = derivatives.path(person)
        lines = path.read_text().splitlines()
        lines = [
            "\t".join([*line.split("\t")[:4], "0"]) if "3rd" in line else line for line in lines
        ]
        path.write_text("\n".join(lines) + "\n")
    cohort = derivatives.gather()
    assert cohort.names == ("Left-Hippocampus", "Right-Hippocampus")
    assert cohort.source["dropped_features"] == {"3rd-Ventricle": "always 0"}
    asked = derivatives.gather(features=["3rd-Ventricle"])
    assert asked.names == ("3rd-Ventricle",) and asked.baseline.tolist() == [[0], [0], [0]]


def test_features_that_a_model_needs_must_be_there(derivatives):
    with pytest.raises(CohortError, match="needs 1 of its 2 features that are missing: Brain-Stem"):
        derivatives.gather(features=["Brain-Stem", "3rd-Ventricle"])


def test_different_ensembles_are_refused_and_listed(derivatives):
    derivatives.add(2, Ensemble=stamp(name="other"))
    with pytest.raises(MixedDerivativesError, match=r"ensemble other: sub-2"):
        derivatives.gather()


def test_other_weights_of_the_same_member_are_refused(derivatives):
    derivatives.add(2, Ensemble=stamp("other"))
    with pytest.raises(MixedDerivativesError, match="weights of ieee other-ieee: sub-2"):
        derivatives.gather()


def test_other_members_of_the_same_ensemble_are_no_mixture(derivatives):
    derivatives.describe(members=("ieee", "mca01"))
    assert len(derivatives.gather()) == 3


def test_sloppy_and_full_derivatives_are_not_mixed(derivatives):
    derivatives.add(2, Warning=SLOPPY_NOTE)
    with pytest.raises(MixedDerivativesError, match="--sloppy True: sub-2"):
        derivatives.gather()


def test_several_versions_of_the_tool_are_refused(derivatives):
    derivatives.describe(versions=("0.1.0", "0.2.0"))
    with pytest.raises(MixedDerivativesError, match="several versions.*0.1.0, 0.2.0"):
        derivatives.gather()


def test_unknown_members_are_refused(derivatives, monkeypatch):
    monkeypatch.setattr(f"{__name__}.MEMBERS", (*MEMBERS, "seed01"))
    derivatives.add(2, members=("ieee", "seed01"), Ensemble=None)
    with pytest.raises(MixedDerivativesError, match=r"sub-2 \(seed01\)"):
        derivatives.gather()


def test_other_structures_are_refused(derivatives):
    derivatives.add(2, structures=(*STRUCTURES[:2], (15, "4th-Ventricle")))
    with pytest.raises(MixedDerivativesError, match="other structures.*sub-2"):
        derivatives.gather()


def test_sidecars_that_do_not_name_the_ensemble_are_of_the_last_run(derivatives):
    derivatives.add(2, Ensemble=None)
    cohort = derivatives.gather()
    assert len(cohort) == 3 and cohort.source["ensemble"] == "aseg31"


def test_outputs_of_nobody_are_no_input(derivatives, tmp_path):
    for person in (1, 2, 3):
        derivatives.path(person).unlink()
    with pytest.raises(NoInputError, match="Run the participant level first"):
        derivatives.gather()
    (tmp_path / "dataset_description.json").unlink()
    with pytest.raises(NoInputError, match="dataset_description.json"):
        derivatives.gather()


def test_missing_descriptions_are_an_error(derivatives, tmp_path):
    (tmp_path / "descriptions.tsv").unlink()
    with pytest.raises(UserError, match="descriptions.tsv does not exist"):
        derivatives.gather()


def test_no_ages_at_all_are_an_error_with_reasons(derivatives):
    derivatives.people("participant_id\tage\nsub-1\tn/a\n")
    with pytest.raises(CohortError, match="nobody is left.*sub-1"):
        derivatives.gather()


def test_people_of_other_names_are_shown_on_both_sides(derivatives):
    derivatives.people("participant_id\tage\nX_1a\t30\nX_2a\t40\n")
    with pytest.raises(CohortError, match=r"\(sub-1, sub-2, sub-3\) is in .*\(sub-X_1a, sub-X_2a"):
        derivatives.gather()


def test_visits_that_are_no_session_are_said_to_be_missing(derivatives):
    derivatives.people("participant_id\tvisit\tage\n1\ta\t30\n1\tb\t32\n")
    with pytest.raises(CohortError, match="sub-1: not in participants.tsv at "):
        derivatives.gather()


def test_cohort_does_not_depend_on_the_order_of_people(derivatives):
    people = read_people(derivatives.root)
    backwards = People(people.table[::-1].reset_index(drop=True))
    cohort = gather_cohort(derivatives.root, backwards)
    assert cohort.people.equals(derivatives.gather().people)
