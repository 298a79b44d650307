import json
import re
from pathlib import Path

import pytest

from bids_varaug.errors import FiltersError, NoInputError, OutputError, UsageError
from bids_varaug.inputs import scans
from bids_varaug.inputs.scans import Selection, datalad_command, find_scans
from bids_varaug.settings import Settings

FILES = [
    "sub-01/ses-a/anat/sub-01_ses-a_acq-x_run-01_T1w.nii.gz",
    "sub-01/ses-a/anat/sub-01_ses-a_acq-x_run-02_T1w.nii.gz",
    "sub-01/ses-b/anat/sub-01_ses-b_T1w.nii",
    "sub-01/ses-b/func/sub-01_ses-b_task-r_bold.nii.gz",
    "sub-02/anat/sub-02_T1w.nii.gz",
    "sub-02/anat/sub-02_part-phase_T1w.nii.gz",
    "sub-02/anat/sub-02_T2w.nii.gz",
    "sub-03/func/sub-03_task-r_bold.nii.gz",
    "sub-10/anat/sub-10_T1w.nii.gz",
    "derivatives/x/sub-02/anat/sub-02_desc-x_T1w.nii.gz",
    "sourcedata/sub-02/anat/sub-02_T1w.nii.gz",
    "derivatives/sub-77/anat/sub-77_T1w.nii.gz",
]


def _touch(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _dangle(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("../../.git/annex/objects/xx/MD5E-s1--0.nii.gz")
    return path


@pytest.fixture
def bids_dir(tmp_path) -> Path:
    root = tmp_path / "my data"
    for name in FILES:
        _touch(root / name)
    (root / "dataset_description.json").write_text(json.dumps({"Name": "x"}))
    return root


@pytest.fixture
def request_for(bids_dir, tmp_path):
    """Make settings on the dataset."""

    def make(**given) -> Settings:
        return Settings(bids_dir, tmp_path / "out", "participant", tmp_path / "work", **given)

    return make


def _found(settings: Settings) -> list[str]:
    return [scan.relative for scan in find_scans(settings).scans]


def _without_t1w(selection: Selection) -> list[str]:
    """Participants who are complained of, and not only a file of theirs."""
    return [found[1] for told in selection.errors if (found := re.match(r"sub-(\w+): ", told))]


def test_every_t1w_of_every_session_acquisition_and_run_is_found(request_for):
    assert _found(request_for()) == [FILES[0], FILES[1], FILES[2], FILES[4], FILES[8]]


def test_participants_are_in_natural_order(bids_dir):
    _touch(bids_dir / "sub-9" / "anat" / "sub-9_T1w.nii")
    assert scans._list_participants(bids_dir)[0] == ["01", "02", "03", "9", "10"]


def test_entities_and_prefix_keep_their_spelling(request_for):
    scan = find_scans(request_for(participant_labels=("01",))).scans[0]
    assert scan.prefix == "sub-01_ses-a_acq-x_run-01"
    assert scan.entities == {"subject": "01", "session": "a", "acquisition": "x", "run": "01"}
    assert (scan.subject, scan.session) == ("01", "a")


def test_scan_without_session_has_none(request_for):
    assert find_scans(request_for(participant_labels=("02",))).scans[0].session is None


def test_only_requested_participants_are_indexed(request_for, bids_dir):
    made = scans._index(bids_dir, ["02"], None)
    assert made.get_subjects() == ["02"]
    assert {Path(f.path).parent.name for f in made.get()} == {"anat"}


def test_excluded_participant_is_left_out(request_for):
    assert _found(request_for(exclude_participant_labels=("01", "10"))) == [FILES[4]]


def test_excluding_everyone_is_a_filter_error(request_for):
    with pytest.raises(FiltersError, match="--exclude-participant-label leaves"):
        find_scans(request_for(exclude_participant_labels=("01", "02", "03", "10")))


def test_session_is_respected(request_for):
    assert _found(request_for(session_labels=("b",))) == [FILES[2]]


def test_missing_participant_is_named_with_those_that_exist(request_for):
    with pytest.raises(FiltersError, match="not in the dataset: 99. There are: 01, 02, 03, 10"):
        find_scans(request_for(participant_labels=("01", "99")))


def test_missing_session_is_named_with_those_that_exist(request_for):
    with pytest.raises(FiltersError, match="session z of .* There are: a, b"):
        find_scans(request_for(session_labels=("z",)))


def test_participant_without_t1w_is_told_and_the_others_go_on(request_for):
    selection = find_scans(request_for())
    assert _without_t1w(selection) == ["03"]
    assert len(selection.scans) == 5


def test_named_participant_that_filters_remove_is_told(request_for):
    selection = find_scans(request_for(participant_labels=("01", "02"), session_labels=("a",)))
    assert _without_t1w(selection) == ["02"]


def test_unnamed_participant_that_filters_remove_is_not_a_failure(request_for):
    assert _without_t1w(find_scans(request_for(session_labels=("a",)))) == ["03"]


def test_only_a_participant_without_t1w_is_no_input(request_for):
    with pytest.raises(NoInputError, match="no T1w image of participant 03"):
        find_scans(request_for(participant_labels=("03",)))


def test_empty_dataset_is_no_input(request_for, bids_dir, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoInputError, match="no sub-"):
        find_scans(Settings(tmp_path / "empty", tmp_path, "participant", tmp_path))


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"acquisition": "x"}, FILES[:2]),
        ({"acquisition": None}, [FILES[2], FILES[4], FILES[8]]),
        ({"acquisition": "Query.NONE"}, [FILES[2], FILES[4], FILES[8]]),
        ({"acquisition": "<Query.NONE: 1>"}, [FILES[2], FILES[4], FILES[8]]),
        ({"acquisition": "*"}, FILES[:2]),
        ({"run": 2}, [FILES[1]]),
        ({"run": "01"}, [FILES[0]]),
        ({"run": [1, 2]}, FILES[:2]),
        ({"session": ["b", None]}, [FILES[2], FILES[4], FILES[8]]),
        ({"session": "ses-b"}, [FILES[2]]),
        ({"extension": ".nii"}, [FILES[2]]),
        ({"subject": ["02", "10"]}, [FILES[4], FILES[8]]),
        ({"part": "phase"}, [FILES[5]]),
    ],
)
def test_filters_select_as_in_nipreps(request_for, filters, expected):
    assert _found(request_for(bids_filters={"t1w": filters})) == expected


def test_filters_of_other_queries_have_no_effect(request_for):
    assert len(_found(request_for(bids_filters={"bold": {"task": "r"}}))) == 5


def test_filters_that_leave_nothing_are_told(request_for):
    with pytest.raises(FiltersError, match="none of the 5 T1w"):
        find_scans(request_for(bids_filters={"t1w": {"acquisition": "none"}}))


def test_unknown_entity_in_filters_is_told_with_a_suggestion(request_for):
    with pytest.raises(UsageError, match="'acq' is not a pybids entity. Did you mean 'acquis"):
        find_scans(request_for(bids_filters={"t1w": {"acq": "x"}}))


def test_filter_value_of_a_wrong_type_is_told(request_for):
    with pytest.raises(UsageError, match="acquisition: True"):
        find_scans(request_for(bids_filters={"t1w": {"acquisition": True}}))


def test_dangling_link_is_reported_and_the_others_go_on(request_for, bids_dir):
    _dangle(bids_dir / "sub-04/anat/sub-04_T1w.nii.gz")
    selection = find_scans(request_for())
    complaint, _ = selection.errors
    assert complaint.startswith("sub-04/anat/sub-04_T1w.nii.gz: ")
    assert complaint.endswith("datalad get sub-04/anat/sub-04_T1w.nii.gz")
    assert len(selection.scans) == 5


def test_unlocked_annex_pointer_counts_as_absent(request_for, bids_dir):
    _touch(bids_dir / "sub-04/anat/sub-04_T1w.nii.gz", b"/annex/objects/MD5E-s1--0.nii.gz\n")
    assert "datalad get sub-04/anat/sub-04_T1w.nii.gz" in find_scans(request_for()).errors[0]


def test_only_dangling_links_print_the_exact_command(request_for, bids_dir):
    _dangle(bids_dir / "sub-04/anat/sub-04_T1w.nii.gz")
    with pytest.raises(NoInputError) as caught:
        find_scans(request_for(participant_labels=("04",)))
    command = f"cd '{bids_dir}' && datalad get sub-04/anat/sub-04_T1w.nii.gz"
    assert str(caught.value).endswith(command)


def test_many_files_of_the_whole_dataset_become_patterns(tmp_path):
    paths = [f"sub-{i}/anat/sub-{i}_T1w.nii.gz" for i in range(30)]
    command = datalad_command(tmp_path, [*paths, "sub-1/ses-1/anat/x_T1w.nii"], whole_dataset=True)
    assert command.endswith("datalad get sub-*/*/*/*_T1w.nii* sub-*/*/*_T1w.nii*")


def test_two_files_of_one_name_do_not_overwrite_each_other(request_for, bids_dir):
    _touch(bids_dir / "sub-10/anat/sub-10_T1w.nii")
    selection = find_scans(request_for(participant_labels=("10",)))
    assert len(selection.scans) == 1
    assert "outputs of the same names" in selection.errors[0]


@pytest.mark.parametrize(
    "name",
    [
        "sub-01/anat/sub-01_ses-b_T1w.nii",
        "sub-01/anat/sub-02_T1w.nii.gz",
        "sub-01/anat/T1w.nii.gz",
        "sub-01/anat/sub-01_copy_sub-02_T1w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-b_T1w.nii.gz",
        "sub-01/ses-a/anat/sub-01_T1w.nii.gz",
        "sub-01/ses-a_old/anat/sub-01_ses-a_T1w.nii.gz",
        "sub-01/ses-pre-op/anat/sub-01_ses-pre-op_T1w.nii.gz",
        "sub-01/ses-/anat/sub-01_ses-_T1w.nii.gz",
        "sub-02/anat/sub-02_acq-a_b_T1w.nii.gz",
        "sub-02/anat/sub-02_acq-a-b_T1w.nii.gz",
        "sub-02/anat/sub-02_acq_T1w.nii.gz",
        "sub-02/anat/sub-02_acq-_T1w.nii.gz",
        "sub-02/anat/sub-02__T1w.nii.gz",
        "sub-02/anat/sub-02_Acq-a_T1w.nii.gz",
        "sub-02/anat/sub-02_acq-a_acq-b_T1w.nii.gz",
        "sub-02/anat/acq-a_sub-02_T1w.nii.gz",
    ],
)
def test_file_that_does_not_agree_with_its_folders_is_named_and_nobodys(
    request_for, bids_dir, name
):
    before = _found(request_for())
    _touch(bids_dir / name)
    selection = find_scans(request_for(participant_labels=("01", "02", "10")))
    assert [scan.relative for scan in selection.scans] == before
    (complaint,) = selection.errors
    assert complaint.startswith(f"{name}: not processed")


STRANGE = (
    "sub-01_copy", "sub-01-backup", "sub-02 (1)", "sub-control-03", "sub-", "Sub-17", "sub_18",
    "SUB-19", "sub20", "Sub 21", "subject-22", "subj_23",
)  # fmt: skip


def test_all_folders_with_impossible_labels_are_named_in_one_message(request_for, bids_dir):
    before = _found(request_for())
    for name in STRANGE:
        _touch(bids_dir / name / "anat" / f"{name}_T1w.nii.gz")
        _touch(bids_dir / name / "anat" / "sub-01_T1w.nii.gz")
    for name in ("subjects", "subcortical", "submission"):
        _touch(bids_dir / name / "sub-01_T1w.nii.gz")
    selection = find_scans(request_for())
    assert [scan.relative for scan in selection.scans] == before
    complaint, without = selection.errors
    assert sorted(complaint.partition(": not processed. ")[0].split(", ")) == sorted(STRANGE)
    assert without.startswith("sub-03: no ")


def test_folders_and_files_with_bad_names_have_a_message_each(request_for, bids_dir):
    _touch(bids_dir / "Sub-17/anat/Sub-17_T1w.nii.gz")
    _touch(bids_dir / "sub-02/anat/sub-01_T1w.nii.gz")
    folder, file, _ = find_scans(request_for()).errors
    assert folder.startswith("Sub-17: not processed. Folders of ")
    assert file.startswith("sub-02/anat/sub-01_T1w.nii.gz: not processed. File names ")


def test_folders_with_impossible_labels_alone_are_named(tmp_path):
    for name in STRANGE:
        _touch(tmp_path / "bids" / name / "anat" / f"{name}_T1w.nii.gz")
    with pytest.raises(NoInputError, match="no sub-<label> folder.*\n.*sub-control-03.*not proc"):
        find_scans(Settings(tmp_path / "bids", tmp_path, "participant", tmp_path))


def test_folder_with_an_impossible_label_is_no_matter_of_a_named_participant(request_for, bids_dir):
    _touch(bids_dir / "sub-02_copy" / "anat" / "sub-02_T1w.nii.gz")
    selection = find_scans(request_for(participant_labels=("02",)))
    assert [scan.relative for scan in selection.scans] == [FILES[4]]
    assert selection.errors == ()


DERIVATIVES = [
    "sub-10/anat/sub-10_space-MNI152NLin2009cAsym_desc-preproc_T1w.nii.gz",
    "sub-10/anat/sub-10_space-MNI152NLin6Asym_res-2_T1w.nii.gz",
    "sub-10/anat/sub-10_space-fsaverage_T1w.nii.gz",
    "sub-10/anat/sub-10_acq-x_space-StudyTemplate_T1w.nii",
    "sub-10/anat/sub-10_tpl-MNI152_T1w.nii.gz",
]


def test_images_in_template_spaces_are_left_out_with_one_message(request_for, bids_dir):
    before = _found(request_for())
    for name in DERIVATIVES:
        _touch(bids_dir / name)
    selection = find_scans(request_for())
    assert [scan.relative for scan in selection.scans] == before
    (note,) = selection.notes
    assert all(name in note for name in DERIVATIVES) and "template space" in note


@pytest.mark.parametrize("space", ["orig", "T1w", "scanner", "individual", "ACPC"])
def test_image_in_the_persons_own_space_is_processed(request_for, bids_dir, space):
    name = f"sub-20/anat/sub-20_space-{space}_desc-preproc_T1w.nii.gz"
    _touch(bids_dir / name)
    assert _found(request_for(participant_labels=("20",))) == [name]


def test_only_images_in_template_spaces_is_no_input(request_for, bids_dir):
    _touch(bids_dir / "sub-20/anat/sub-20_space-MNI152Lin_T1w.nii.gz")
    with pytest.raises(NoInputError, match="sub-20_space-MNI152Lin_T1w.nii.gz: .*template space"):
        find_scans(request_for(participant_labels=("20",)))


@pytest.mark.parametrize("filters", [{"space": "MNI152Lin"}, {"desc": "x"}])
def test_filters_that_leave_only_template_spaces_are_told(request_for, bids_dir, filters):
    _touch(bids_dir / "sub-10/anat/sub-10_space-MNI152Lin_desc-x_T1w.nii.gz")
    with pytest.raises(FiltersError, match="none of the 5 T1w[^@]*template space"):
        find_scans(request_for(bids_filters={"t1w": filters}))


@pytest.mark.parametrize(("entity", "labels"), [("chunk", [1, 2]), ("hemi", ["L"])])
def test_parts_of_a_head_are_left_out_unless_asked_for(request_for, bids_dir, entity, labels):
    chunks = [f"sub-20/anat/sub-20_{entity}-{label}_T1w.nii.gz" for label in labels]
    for name in chunks:
        _touch(bids_dir / name)
    selection = find_scans(request_for(participant_labels=("10", "20")))
    assert [scan.relative for scan in selection.scans] == [FILES[8]]
    assert all(name in selection.notes[0] for name in chunks)
    assert _without_t1w(selection) == ["20"]
    asked = request_for(participant_labels=("20",), bids_filters={"t1w": {entity: labels}})
    assert _found(asked) == chunks


MADE = ["space-T1w_desc-brain", "space-orig_desc-preproc", "desc-x_res-2"]


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("acq", ["", "_acq-y_run-1"])
def test_derivative_beside_its_raw_image_is_left_out(request_for, bids_dir, made, acq):
    raw, derivative, other = (
        f"sub-20/anat/sub-20{name}_T1w.nii.gz" for name in (acq, f"{acq}_{made}", f"_acq-z_{made}")
    )
    for name in (raw, derivative, other):
        _touch(bids_dir / name)
    selection = find_scans(request_for(participant_labels=("20",)))
    assert {scan.relative for scan in selection.scans} == {raw, other}
    assert selection.notes[0].startswith(f"{derivative}: left out beside its raw image.")
    desc = made.partition("desc-")[2].partition("_")[0]
    asked = request_for(participant_labels=("20",), bids_filters={"t1w": {"desc": desc}})
    assert set(_found(asked)) == {derivative, other}


def test_derivative_of_an_ignored_image_is_processed(request_for, bids_dir):
    names = [f"sub-20/anat/sub-20{desc}_T1w.nii.gz" for desc in ("", "_desc-brain")]
    for name in names:
        _touch(bids_dir / name)
    (bids_dir / ".bidsignore").write_text("sub-20_T1w.nii.gz\n")
    assert _found(request_for(participant_labels=("20",))) == names[1:]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("space-MNI152Lin", "left out: volumes in a template space"),
        ("chunk-1", "left out: part of a head"),
        ("part-phase", "left out: the phase"),
        ("acq-a_b", "not processed. File names"),
    ],
)
@pytest.mark.parametrize("labels", [(), ("06", "10")])
def test_participant_of_whom_all_is_left_out_is_told_why(
    request_for, bids_dir, name, reason, labels
):
    _touch(bids_dir / f"sub-06/anat/sub-06_{name}_T1w.nii.gz")
    selection = find_scans(request_for(participant_labels=labels))
    assert "06" in _without_t1w(selection)
    assert any(told.startswith(f"sub-06: {reason}") for told in selection.errors)
    assert "filters" not in "".join(selection.errors)
    with pytest.raises(NoInputError, match=f"of participant 06 can be used.\n.*T1w.*: {reason}"):
        find_scans(request_for(participant_labels=("06",)))


FLAGS = {
    "--session-label": {"session_labels": ("a",)},
    "--bids-filter-file": {"bids_filters": {"t1w": {"acquisition": "x"}}},
}


@pytest.mark.parametrize("flags", [list(FLAGS), *([flag] for flag in FLAGS)])
def test_only_flags_that_were_given_are_named(request_for, flags):
    given = {name: value for flag in flags for name, value in FLAGS[flag].items()}
    errors = find_scans(request_for(participant_labels=("01", "02"), **given)).errors
    assert errors == (f"sub-02: no usable T1w image passes {' and '.join(flags)}.",)


def test_error_names_the_only_flag_that_was_given(request_for):
    with pytest.raises(FiltersError, match=r"passes --bids-filter-file\. "):
        find_scans(request_for(bids_filters={"t1w": {"acquisition": "none"}}))
    filters = {"t1w": {"acquisition": None}}
    with pytest.raises(FiltersError, match="passes --session-label and --bids-filter-file"):
        find_scans(request_for(session_labels=("a",), bids_filters=filters))


def test_images_that_differ_in_what_only_derivatives_have_do_not_collide(request_for, bids_dir):
    names = [f"sub-20/anat/sub-20_desc-{desc}_T1w.nii.gz" for desc in ("brain", "preproc")]
    for name in names:
        _touch(bids_dir / name)
    selection = find_scans(request_for(participant_labels=("20",)))
    assert [scan.prefix for scan in selection.scans] == ["sub-20"]
    assert f"{names[1]}: {names[0]} would give outputs of the same names" in selection.errors[0]
    chosen = request_for(participant_labels=("20",), bids_filters={"t1w": {"desc": "preproc"}})
    assert _found(chosen) == [names[1]]


@pytest.mark.parametrize(
    ("lines", "left"),
    [
        (["sub-01/"], [4, 8]),
        (["sub-01"], [4, 8]),
        (["/sub-01/"], [4, 8]),
        (["SUB-01/"], [4, 8]),
        (["/ses-a/"], [0, 1, 2, 4, 8]),
        (["ses-a/"], [2, 4, 8]),
        (["sub-01/**"], [4, 8]),
        (["**/ses-a/**", "sub-10/anat/*.nii.gz"], [2, 4]),
        (["# sub-01/", "", "   ", "sub-02/  "], [0, 1, 2, 8]),
        (["*_T1w.nii.gz", "!sub-02_T1w.nii.gz"], [2, 4]),
        (["sub-*/", "!sub-02/"], [4]),
        (["sub-01/", "!sub-01/ses-b/anat/sub-01_ses-b_T1w.nii"], [4, 8]),
        (["sub-0[12]/"], [8]),
        (["*_run-0?_*"], [2, 4, 8]),
        (["derivatives/", "extra_data"], [0, 1, 2, 4, 8]),
    ],
)
def test_bidsignore_decides_what_is_processed(request_for, bids_dir, lines, left):
    (bids_dir / ".bidsignore").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    selection = find_scans(request_for())
    assert [scan.relative for scan in selection.scans] == [FILES[number] for number in left]
    assert all(complaint.startswith("sub-03") for complaint in selection.errors)


def test_ignored_participant_is_not_without_t1w(request_for, bids_dir):
    (bids_dir / ".bidsignore").write_text("sub-03/\nsub-01_copy\nsub-10/anat/\n")
    _touch(bids_dir / "sub-01_copy" / "anat" / "sub-01_T1w.nii.gz")
    selection = find_scans(request_for(exclude_participant_labels=("03",)))
    assert len(selection.scans) == 4
    assert selection.errors == ()
    assert selection.notes == (f"{FILES[8]}: left out by .bidsignore.",)


def test_named_participant_who_is_ignored_is_told(request_for, bids_dir):
    (bids_dir / ".bidsignore").write_text("sub-02/\n*_T1w.nii.gz\n")
    with pytest.raises(FiltersError, match="--participant-label: 02: left out by .bidsignore"):
        find_scans(request_for(participant_labels=("01", "02")))
    with pytest.raises(NoInputError, match="of participant 10.*\n.*10_T1w.nii.gz: .*bidsignore"):
        find_scans(request_for(participant_labels=("10",)))
    errors = find_scans(request_for(participant_labels=("01", "10"))).errors
    assert errors == ("sub-10: left out by .bidsignore.",)


def test_bidsignore_that_cannot_be_read_is_told(request_for, bids_dir):
    _dangle(bids_dir / ".bidsignore")
    with pytest.raises(NoInputError, match=".bidsignore: cannot read it"):
        find_scans(request_for())


def test_linked_participant_folder_is_followed(request_for, bids_dir, tmp_path):
    _touch(tmp_path / "elsewhere/anat/sub-20_T1w.nii.gz")
    (bids_dir / "sub-20").symlink_to(tmp_path / "elsewhere")
    assert _found(request_for(participant_labels=("20",))) == ["sub-20/anat/sub-20_T1w.nii.gz"]


def test_database_is_made_and_read(request_for, tmp_path, monkeypatch):
    settings = request_for(bids_database_dir=tmp_path / "db")
    first = _found(settings)
    monkeypatch.setattr(scans, "_index", None)  # a second index would fail
    assert _found(request_for(bids_database_dir=tmp_path / "db", participant_labels=("02",))) == [
        FILES[4]
    ]
    assert len(first) == 5


def test_database_of_other_participants_gives_the_right_answer(request_for, tmp_path):
    database = tmp_path / "db"
    _found(request_for(bids_database_dir=database, participant_labels=("02",)))
    assert len(_found(request_for(bids_database_dir=database))) == 5


def test_database_of_another_dataset_is_refused(request_for, tmp_path):
    database = tmp_path / "db"
    _found(request_for(bids_database_dir=database))
    _touch(tmp_path / "other/sub-01/anat/sub-01_T1w.nii")
    other = Settings(
        tmp_path / "other", tmp_path, "participant", tmp_path, bids_database_dir=database
    )
    with pytest.raises(UsageError, match="the database is of"):
        find_scans(other)


def test_damaged_database_is_refused(request_for, tmp_path):
    _touch(tmp_path / "db" / scans.DATABASE_FILE, b"not a database at all")
    with pytest.raises(UsageError, match="cannot read this database"):
        find_scans(request_for(bids_database_dir=tmp_path / "db"))


def test_database_that_cannot_be_written_is_an_output_error(request_for, tmp_path):
    _touch(tmp_path / "file")
    with pytest.raises(OutputError, match="pybids database"):
        find_scans(request_for(bids_database_dir=tmp_path / "file" / "db"))
