"""Runs into an output directory that has derivatives already."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bids_varaug.derivatives.provenance import (
    SETTINGS_KEY,
    MixedDerivativesError,
    Origin,
    check_rerun,
    recorded_settings,
    shown_settings,
)
from bids_varaug.derivatives.sidecars import SLOPPY_NOTE
from bids_varaug.inputs.scans import Scan
from bids_varaug.settings import Settings

MEMBERS = ("ieee", "mca01", "rr01")
RUN = Origin(
    "this run",
    ensemble="old",
    version="1",
    tool_version="0.1.0",
    sloppy=False,
    sha256={member: f"sha-{member}" for member in MEMBERS},
    seeds={"rr01": 1},
)
OTHERS = {
    "ensemble": replace(RUN, ensemble="new"),
    "version of the ensemble": replace(RUN, version="2"),
    "version of bids_varaug": replace(RUN, tool_version="0.2.0"),
    "--sloppy": replace(RUN, sloppy=True),
    "weights of mca01": replace(RUN, sha256=RUN.sha256 | {"mca01": "other"}),
    "members": replace(RUN, sha256={"ieee": "sha-ieee"}, seeds={}),
    "seed of rr01": replace(RUN, seeds={"rr01": 101}),
}
DIFFERENCES = {
    "ensemble": "ensemble old (now new)",
    "version of the ensemble": "version of the ensemble 1 (now 2)",
    "version of bids_varaug": "version of bids_varaug 0.1.0 (now 0.2.0)",
    "--sloppy": "--sloppy False (now True)",
    "weights of mca01": "other weights of mca01",
    "members": "members ieee, mca01, rr01 (now ieee)",
    "seed of rr01": "seed of rr01 1 (now 101)",
}


def scan(prefix: str) -> Scan:
    folder = "/".join(part for part in prefix.split("_") if part[:4] in ("sub-", "ses-"))
    relative = f"{folder}/anat/{prefix}_T1w.nii.gz"
    return Scan(Path("/bids") / relative, {"subject": prefix.split("_")[0][4:]}, relative)


class Output:
    """Output directory of a run of `RUN` on these images."""

    def __init__(self, root: Path):
        self.root = root

    def add(self, prefix: str, origin: Origin = RUN, kind: str = "members_morph") -> Path:
        content = {"Warning": SLOPPY_NOTE} if origin.sloppy else {}
        if kind == "members_morph" and origin.ensemble:
            content["Ensemble"] = {
                "Name": origin.ensemble,
                "Version": origin.version,
                "SHA256": dict(origin.sha256),
                "Seed": dict(origin.seeds),
            }
            content["GeneratedBy"] = [{"Name": "bids_varaug", "Version": origin.tool_version}]
        folder = (self.root / scan(prefix).relative).parent
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{prefix}_seg-varaug_desc-{kind}.json"
        path.write_text(json.dumps(content))
        return path

    def describe(self, origin: Origin = RUN) -> None:
        made = {"Name": "bids_varaug", "Version": origin.tool_version}
        (self.root / "dataset_description.json").write_text(json.dumps({"GeneratedBy": [made]}))
        rows = "".join(f"desc-{m}\tx\tx\t{sha}\n" for m, sha in origin.sha256.items())
        table = "desc_id\tdescription\tfamily\tsha256\n" + rows
        (self.root / "descriptions.tsv").write_text(table)


@pytest.fixture
def output(tmp_path) -> Output:
    made = Output(tmp_path)
    made.describe()
    made.add("sub-01_ses-a")
    made.add("sub-01_ses-b")
    made.add("sub-02")
    return made


@pytest.mark.parametrize("prefixes", [[], ["sub-02"], ["sub-03"], ["sub-01_ses-a", "sub-02"]])
def test_the_same_ensemble_goes_on_with_anybody(output, prefixes):
    check_rerun(output.root, RUN, map(scan, prefixes))


@pytest.mark.parametrize("what", OTHERS)
def test_what_would_relabel_others_is_refused(output, what):
    with pytest.raises(MixedDerivativesError) as caught:
        check_rerun(output.root, OTHERS[what], map(scan, ["sub-01_ses-a", "sub-03"]))
    said = str(caught.value)
    assert f"\n  sub-01_ses-b, sub-02: {DIFFERENCES[what]}\n" in said
    assert "--participant-label 01 02, beside" in said


def test_all_that_differs_is_said(output):
    new = replace(RUN, sloppy=True, sha256=RUN.sha256 | {"mca02": "x"})
    output.add("sub-02", replace(RUN, sloppy=True, seeds={"rr01": 101}))
    with pytest.raises(MixedDerivativesError) as caught:
        check_rerun(output.root, new, map(scan, ["sub-01_ses-a", "sub-01_ses-b"]))
    members = "members ieee, mca01, rr01 (now ieee, mca01, mca02, rr01)"
    assert f"\n  sub-02: seed of rr01 101 (now 1); {members}\n" in str(
        caught.value
    )


@pytest.mark.parametrize("what", OTHERS)
def test_what_makes_everything_again_is_allowed(output, what):
    everything = ["sub-01_ses-a", "sub-01_ses-b", "sub-02"]
    check_rerun(output.root, OTHERS[what], map(scan, everything))
    check_rerun(output.root, OTHERS[what], map(scan, [*everything, "sub-03"]))


def test_sessions_that_stay_are_refused(output):
    with pytest.raises(MixedDerivativesError, match="  sub-01_ses-b: "):
        check_rerun(output.root, OTHERS["--sloppy"], map(scan, ["sub-01_ses-a", "sub-02"]))


def test_a_root_that_was_replaced_does_not_hide_what_stays(output):
    """As after a run of everything with another ensemble that was interrupted."""
    new = OTHERS["ensemble"]
    output.describe(new)
    output.add("sub-01_ses-a", new)
    check_rerun(output.root, new, map(scan, ["sub-01_ses-a", "sub-01_ses-b", "sub-02"]))
    with pytest.raises(MixedDerivativesError, match="sub-01_ses-b, sub-02: ensemble old"):
        check_rerun(output.root, new, map(scan, ["sub-01_ses-a"]))


@pytest.mark.parametrize("kind", ["members_morph", "consensus_dseg"])
def test_what_does_not_say_who_made_it_is_of_the_last_run(output, kind):
    """Older versions did not say; an interrupted image has no table yet."""
    output.add("sub-04", replace(RUN, ensemble=None), kind)
    check_rerun(output.root, RUN, [])
    everybody_else = [*map(scan, ["sub-01_ses-a", "sub-01_ses-b", "sub-02"])]
    with pytest.raises(MixedDerivativesError, match="  sub-04: other weights of mca01\n"):
        check_rerun(output.root, OTHERS["weights of mca01"], everybody_else)


def test_output_of_another_tool_and_a_damaged_root_are_no_obstacle(tmp_path, output):
    (output.root / "dataset_description.json").write_text("{")
    output.add("sub-02").write_text("{")
    check_rerun(output.root, RUN, [])
    check_rerun(tmp_path / "new", RUN, [])


def test_settings_are_those_that_the_sidecar_tells(output):
    """Paths are those of the new command line; of the ensemble's folder only the name is told."""
    given = Settings(Path("/bids"), output.root, "participant", Path("/work"), nprocs=3, ensemble="/new/own")
    made = replace(
        given, members=("ieee", "mca"), n_members=2, output_spaces=("MNI152NLin2009cAsym:res-2",), refine=0,
        bids_filters={"t1w": {"acquisition": None}},
    )  # fmt: skip
    written = json.dumps({SETTINGS_KEY: shown_settings(replace(made, ensemble="/old/own", nprocs=1))})
    assert "/old" not in written
    output.add("sub-02").write_text(written)
    output.add("sub-03").write_text("{")
    found = recorded_settings(given, map(scan, ["sub-01_ses-a", "sub-02", "sub-03", "sub-04"]))
    assert found == {"sub-01_ses-a": given, "sub-02": made, "sub-03": given}
    assert recorded_settings(replace(given, ensemble="aseg31"), [scan("sub-02")])["sub-02"].ensemble == "own"
