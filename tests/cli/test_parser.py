import os
import subprocess
import sys
from pathlib import Path

import pytest

from bids_varaug.cli import parser
from bids_varaug.errors import NoInputError, OutputError, UsageError
from bids_varaug.machine import available_processors


@pytest.fixture
def places(tmp_path, monkeypatch) -> list[str]:
    """Positional arguments of a run; the current directory is elsewhere."""
    (tmp_path / "ds").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return [str(tmp_path / "ds"), str(tmp_path / "out"), "participant"]


@pytest.fixture
def config(tmp_path):
    """Write a configuration file and give the arguments that name it."""

    def make(text: str) -> list[str]:
        path = tmp_path / "config.toml"
        path.write_text(text)
        return ["--config-file", str(path)]

    return make


def test_defaults(places, tmp_path):
    settings = parser.parse_settings(places)
    assert settings.bids_dir == tmp_path / "ds"
    assert settings.output_dir == tmp_path / "out"
    assert settings.work_dir == tmp_path / "cwd" / "work"
    assert settings.ensemble == "aseg31"
    assert settings.members == ("all",)
    assert settings.perturb_inference == 0
    assert settings.device == "auto"
    assert settings.nprocs == available_processors()
    assert settings.omp_nthreads == min(settings.nprocs, 8)


def test_nothing_is_created(places, tmp_path):
    parser.parse_settings(places)
    assert sorted(os.listdir(tmp_path)) == ["cwd", "ds"]


def test_all_participant_flags_reach_the_settings(places, tmp_path):
    filters = tmp_path / "f.json"
    filters.write_text('{"t1w": {"acquisition": null}}')
    plugin = tmp_path / "p.yml"
    plugin.write_text("plugin: SLURM\nplugin_args: {sbatch_args: -n1}\n")
    settings = parser.parse_settings(
        [*places, "--participant-label", "sub-01", "02", "--exclude-participant-label", "03"]
        + ["--session-label", "ses-a", "--bids-filter-file", str(filters)]
        + ["--bids-database-dir", "db", "--skip-bids-validation", "--trust", "qform"]
        + ["--ensemble", "./mine"]
        + ["--members", "mca", "seed01", "--n-members", "2", "--write-members"]
        + ["--perturb_inference", "99"]
        + ["--device", "cuda:1", "--nprocs", "4", "--omp-nthreads", "3", "--mem", "8000M"]
        + ["--use-plugin", str(plugin), "-w", "../w", "--clean-workdir", "--random-seed", "7"]
        + ["--sloppy", "--whole-voxels", "--dry-run", "--reports-only", "--stop-on-first-crash", "--notrack", "-vv"]
    )
    assert settings.participant_labels == ("01", "02")
    assert settings.exclude_participant_labels == ("03",)
    assert settings.session_labels == ("a",)
    assert settings.bids_filters == {"t1w": {"acquisition": None}}
    assert settings.bids_database_dir == tmp_path / "cwd" / "db"
    assert (settings.ensemble, settings.trust) == (str(tmp_path / "cwd" / "mine"), "qform")
    assert settings.members == ("mca", "seed01")
    assert (settings.n_members, settings.device) == (2, "cuda:1")
    assert settings.perturb_inference == 99
    assert (settings.nprocs, settings.omp_nthreads, settings.mem_gb) == (4, 3, 7.8125)
    assert settings.plugin == {"plugin": "SLURM", "plugin_args": {"sbatch_args": "-n1"}}
    assert settings.work_dir == tmp_path / "w"
    assert (settings.random_seed, settings.verbosity) == (7, 2)
    for name in ("skip_bids_validation", "write_members", "clean_workdir", "sloppy", "whole_voxels", "dry_run"):
        assert getattr(settings, name) is True
    assert settings.reports_only and settings.stop_on_first_crash


def test_group_flags_reach_the_settings(places):
    settings = parser.parse_settings(
        [*places[:2], "group", "--age-column", "years", "--brainage-model", "svr"]
        + ["--augmentation", "members", "--cv-folds", "3"]
    )
    assert (settings.level, settings.age_column, settings.brainage_model) == (
        "group",
        "years",
        "svr",
    )
    assert (settings.augmentation, settings.cv_folds) == ("members", 3)


def test_every_dashed_flag_may_have_underscores(places):
    actions = parser.build_parser()._option_string_actions
    for flag in actions:
        if flag.startswith("--"):
            assert parser.dash_flag("--" + flag[2:].replace("-", "_")) == flag
    assert parser.parse_settings([*places, "--participant_label", "a"]).participant_labels == ("a",)


def test_value_with_underscores_is_left_alone(places):
    settings = parser.parse_settings([*places, "--age_column=my_age", "-w", "../my_work"])
    assert (settings.age_column, settings.work_dir.name) == ("my_age", "my_work")


def test_aliases(places, tmp_path):
    plugin = tmp_path / "p.yml"
    plugin.write_text("plugin: Linear\n")
    settings = parser.parse_settings(
        [*places, "--session-id", "a", "--nipype-plugin-file", str(plugin)]
    )
    assert settings.session_labels == ("a",)
    assert settings.plugin == {"plugin": "Linear", "plugin_args": {}}


def test_repeated_labels_count_once(places):
    settings = parser.parse_settings([*places, "--participant-label", "01", "sub-01"])
    assert settings.participant_labels == ("01",)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--participant-label", "../x"], "not a BIDS label"),
        (["--participant-label", "01/anat"], "not a BIDS label"),
        (["--participant-label", ""], "not a BIDS label"),
        (["--participant-label", "."], "not a BIDS label"),
        (["--participant-label", "0*"], "not a BIDS label"),
        (["--participant-label", "sub-"], "not a BIDS label"),
        (["--participant-label", "01,02"], "separated by spaces"),
        (["--session-label", "a/b"], "not a BIDS label"),
        (["--n-members", "0"], "'0' is not a whole number from 1"),
        (["--n-members", "two"], "'two' is not a whole number from 1"),
        (["--nprocs", "0"], "whole number from 1"),
        (["--nprocs", "2", "--omp-nthreads", "3"], "more than --nprocs"),
        (["--device", "gpu"], "gpu"),
        (["--mem", "lots"], "amount of memory"),
        (["--mem", "0"], "amount of memory"),
        (["--members", "mca,../x"], "not a family"),
        (["--perturb-inference", "-1"], "from 0 to 99"),
        (["--perturb-inference", "100"], "from 0 to 99"),
        (["--perturb-inference", "1.5"], "from 0 to 99"),
        (["--random-seed", "-1"], "from 0 to 4294967295"),
        (["--random-seed", "4294967296"], "from 0 to 4294967295"),
        (["--cv-folds", "1"], "whole number from 2"),
        (["--bids-filter-file", "absent.json"], "no such file"),
        (["--unknown-flag"], "--unknown-flag"),
        (["--particip", "01"], "--particip"),
        (["--brainage-model", "magic"], "magic"),
    ],
)
def test_bad_value_is_a_usage_error(places, flags, message):
    with pytest.raises(UsageError, match=message) as caught:
        parser.parse_settings([*places, *flags])
    assert caught.value.exit_code == 64


def test_too_few_arguments_are_a_usage_error(places):
    with pytest.raises(UsageError, match="are required"):
        parser.parse_settings(places[:2])


def test_unknown_level_has_its_own_code(places):
    with pytest.raises(UsageError, match="participant or group") as caught:
        parser.parse_settings([*places[:2], "session"])
    assert caught.value.exit_code == 17


@pytest.mark.parametrize(
    ("text", "gib"), [("8G", 8), ("8", 8), ("8000M", 7.8125), ("1.5gb", 1.5), ("1T", 1024)]
)
def test_memory_is_understood(places, text, gib):
    assert parser.parse_settings([*places, "--mem", text]).mem_gb == gib


def test_missing_input_is_no_input(places):
    with pytest.raises(NoInputError, match="does not exist") as caught:
        parser.parse_settings([places[0] + "x", *places[1:]])
    assert caught.value.exit_code == 66


@pytest.mark.parametrize("output", ["", "sub-01", "derivatives", "sourcedata/x"])
def test_output_inside_input_is_refused(places, output):
    with pytest.raises(UsageError, match="derivatives"):
        parser.parse_settings([places[0], os.path.join(places[0], output), "participant"])


def test_output_that_is_the_input_by_a_link_is_refused(places, tmp_path):
    (tmp_path / "link").symlink_to(places[0])
    with pytest.raises(UsageError, match="outside of the input dataset"):
        parser.parse_settings([places[0], str(tmp_path / "link"), "participant"])


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("../ds/fs", "the FreeSurfer directory must lie outside .*derivatives/freesurfer"),
        ("../out", "this is the output directory"),
        ("../work/fs", "work directory must not"),
    ],
)
def test_freesurfer_directory_where_it_would_mix_data_is_refused(places, folder, message):
    with pytest.raises(UsageError, match=message):
        parser.parse_settings([*places, "-w", "../work", "--freesurfer-dir", folder])


def test_freesurfer_directory_may_lie_in_the_output(places, tmp_path):
    given = parser.parse_settings([*places, "--freesurfer-dir", "../out/sourcedata/freesurfer"])
    assert given.freesurfer_dir == tmp_path / "out" / "sourcedata" / "freesurfer"


def test_output_below_derivatives_is_allowed(places):
    output = Path(places[0]) / "derivatives" / "varaug"
    assert parser.parse_settings([places[0], str(output), "participant"]).output_dir == output


@pytest.mark.parametrize("work", ["../ds/work", "..", "../out"])
def test_work_directory_that_would_mix_or_remove_data_is_refused(places, work):
    with pytest.raises(UsageError, match="work directory"):
        parser.parse_settings([*places, "-w", work])


def test_output_that_is_a_file_is_refused(places, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="this is a file") as caught:
        parser.parse_settings(places)
    assert caught.value.exit_code == 73


def test_output_without_permission_is_refused(places, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(OutputError, match="no permission"):
        parser.parse_settings(places)


@pytest.mark.parametrize("flag", ["output", "work", "input"])
def test_place_that_may_not_be_looked_into_is_told(places, tmp_path, monkeypatch, flag):
    locked = tmp_path / "locked"
    locked.mkdir()

    def refuse_inside(call):
        def checked(path, *rest, **options):
            if str(path).startswith(f"{locked}/"):
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *rest, **options)

        return checked

    access = os.access
    monkeypatch.setattr(os, "stat", refuse_inside(os.stat))
    monkeypatch.setattr(os, "lstat", refuse_inside(os.lstat))
    monkeypatch.setattr(os, "access", lambda path, m: Path(path) != locked and access(path, m))
    inside = str(locked / "a" / "b")
    arguments = {
        "output": [places[0], inside, "participant"],
        "work": [*places, "-w", inside],
        "input": [inside, *places[1:]],
    }[flag]
    with pytest.raises((OutputError, NoInputError), match="locked"):
        parser.parse_settings(arguments)


@pytest.mark.parametrize("target", ["nowhere", "out"])
def test_output_that_is_a_dangling_link_is_refused(places, tmp_path, target):
    (tmp_path / "out").symlink_to(target)
    with pytest.raises(OutputError, match="dangling link"):
        parser.parse_settings(places)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ('{"Name": "raw"}', "raw BIDS dataset"),
        ('{"DatasetType": "derivative", "GeneratedBy": [{"Name": "fMRIPrep"}]}', "fMRIPrep"),
    ],
)
def test_output_of_another_dataset_is_refused(places, tmp_path, description, message):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dataset_description.json").write_text(description)
    with pytest.raises(UsageError, match=message):
        parser.parse_settings(places)


def test_own_earlier_output_is_accepted(places, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dataset_description.json").write_text(
        '{"DatasetType": "derivative", "GeneratedBy": [{"Name": "bids_varaug"}]}'
    )
    assert parser.parse_settings(places).output_dir == tmp_path / "out"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{bad", "cannot read it as JSON: .*: line 1 column 2"),
        ("[]", "expected a form like"),
        ('{"t1w": "x"}', "expected a form like"),
        ('{"T1w": {}}', "unknown query 'T1w'"),
    ],
)
def test_bad_filter_file_is_told(places, tmp_path, text, message):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        parser.parse_settings([*places, "--bids-filter-file", "../f.json"])


@pytest.mark.parametrize("text", ["a: [", "n_procs: 3", "plugin: X\nplugin_args: 3"])
def test_bad_plugin_file_is_told(places, tmp_path, text):
    (tmp_path / "p.yml").write_text(text)
    with pytest.raises(UsageError, match="p.yml"):
        parser.parse_settings([*places, "--use-plugin", "../p.yml"])


def test_config_file_gives_defaults(places, config):
    text = """
    participant-label = ["sub-01", "02"]
    session_label = "a"
    mem = "2G"
    nprocs = 3
    sloppy = true
    dry-run = false
    verbose = 1
    members = ["mca"]
    perturb_inference = 10
    """
    settings = parser.parse_settings([*places, *config(text)])
    assert settings.participant_labels == ("01", "02")
    assert settings.session_labels == ("a",)
    assert (settings.mem_gb, settings.nprocs, settings.verbosity) == (2.0, 3, 1)
    assert (settings.sloppy, settings.dry_run) == (True, False)
    assert (settings.members, settings.perturb_inference) == (("mca",), 10)


def test_flags_of_the_other_level_are_told(places, capsys):
    parser.parse_settings([*places, "--cv-folds", "7", "--age-column", "years"])
    assert capsys.readouterr().err == "Note: --cv-folds has no effect at the participant level.\n"
    parser.parse_settings([*places[:2], "group", "--members", "mca", "--cv-folds", "7"])
    assert capsys.readouterr().err == "Note: --members has no effect at the group level.\n"


def test_command_line_wins_over_config_file(places, config):
    given = config('participant-label = ["01"]\nnprocs = 3\n')
    settings = parser.parse_settings([*places, *given, "--participant-label", "09", "--nprocs=2"])
    assert (settings.participant_labels, settings.nprocs) == (("09",), 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 'red'", "unknown flag 'colour'"),
        ("config-file = 'x'", "unknown flag"),
        ("sloppy = 'yes'", "sloppy = 'yes': write true or false"),
        ("help = true", "unknown flag"),
        ("[section]\nmem = 8", "unknown flag 'section'"),
        ("verbose = 1000", "verbose"),
        ("sloppy = 'yes'", "sloppy"),
        ("mem = true", "mem"),
        ("mem = ['1G', '2G']", "mem"),
        ("mem = 'lots'", "amount of memory"),
        ("mem =", "TOML"),
        ("participant-label = []", "participant-label"),
    ],
)
def test_bad_config_file_is_told(places, config, text, message):
    with pytest.raises(UsageError, match=message):
        parser.parse_settings([*places, *config(text)])


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_end_well(flag, capsys):
    with pytest.raises(SystemExit) as caught:
        parser.parse_settings([flag])
    assert caught.value.code == 0
    assert "bids_varaug" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from bids_varaug.cli import parser; parser.build_parser().format_help();"
        "print([m for m in ('torch', 'nipype', 'bids', 'nibabel', 'pandas', 'numpy')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("flags", [["--refine", "0"], ["--allow-downloads"]])
def test_flags_of_output_spaces_without_any_are_told(places, capsys, flags):
    parser.parse_settings([*places, *flags])
    assert capsys.readouterr().err == f"Note: {flags[0]} has no effect without --output-spaces.\n"
    parser.parse_settings([*places, *flags, "--output-spaces", parser.SPACE])
    assert capsys.readouterr().err == ""
