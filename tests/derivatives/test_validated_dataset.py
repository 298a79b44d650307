"""Every output name, tried with the schema validator."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from bids_varaug.derivatives import io, names, sidecars
from bids_varaug.derivatives.citation import Citation
from bids_varaug.files import write_json, write_text
from bids_varaug.inputs.scans import Scan
from bids_varaug.inputs.validation import find_validator, run_validator
from bids_varaug.registration.space import SPACE, OutputSpace
from bids_varaug.reports.participant import figure_name
from bids_varaug.settings import Settings
from tests.derivatives.conftest import LABELS, request_of

pytestmark = pytest.mark.skipif(find_validator() is None, reason="bids-validator-deno missing")

COARSE = OutputSpace(SPACE, 2)
PREFIXES = {
    "sub-01/anat": ["sub-01", "sub-01_run-2"],
    "sub-02/ses-a/anat": [
        "sub-02_ses-a_acq-x_run-01",
        "sub-02_ses-a_task-t_acq-x_ce-c_rec-r_run-1_echo-1_part-mag_chunk-1",
    ],
    # What only derivatives have, or what no T1w image has.
    "sub-03/anat": ["sub-03_space-T1w_res-1_desc-preproc", "sub-03_den-32k_label-brain"],
    "sub-04/ses-a/anat": ["sub-04_ses-a_space-orig_seg-x_scale-1_desc-x", "sub-04_ses-a_hemi-L"],
    "sub-05/anat": ["sub-05_acq-x_mod-x_inv-1_proc-x_split-1_recording-x_atlas-x_stat-x"],
}
MEMBERS = [
    SimpleNamespace(id="ieee", family="ieee", seed=1, precision=None, sha256="a" * 64),
    SimpleNamespace(id="mca01", family="mca", seed=1, precision=24, sha256="b" * 64),
    SimpleNamespace(id="rr01", family="rr", seed=1, precision=24, sha256="a" * 64),
]


def _run(bids_dir, output_dir):
    settings = Settings(bids_dir, output_dir, "participant", output_dir)
    return names.Run(settings, SimpleNamespace(labels=LABELS, is_fastsurfer=False), MEMBERS)


def _write_outputs(output_dir, scan):
    affine, request = np.diag([2.0, 2, 2, 1]), request_of(scan)
    request = replace(request, settings=replace(request.settings, output_dir=output_dir))
    for key, output in names.ALL_OUTPUTS.items():
        member, space = "mca01" if output.per_member else None, COARSE if output.in_space else None
        path = request.path(key, member, space)
        if output.extension == ".tsv":
            row = dict.fromkeys(output.columns, 1) | {"name": "L-Hip", "index": 17}
            if "verdict" in row:
                row |= {"verdict": "caution", "reason": "CV 6.1 % (above 5 %); 9 voxels"}
            if "member" in row:
                row |= {"member": "mca01", "family": "mca"}
            io.write_table(pd.DataFrame([row]), path)
        elif output.extension == ".h5":
            write_text("HDF", path)
        else:
            shape = (8, 8, 8, 2) if key == "mean_probseg" else (8, 8, 8)
            dtype = "uint8" if output.suffix in ("mask", "dseg") else "float32"
            io.write_image(np.ones(shape, dtype), affine, path)
        # The table shares the sidecar of the consensus labels, which describes both.
        if key != "regions_tsv":
            content = sidecars.sidecar(request, key, member, extra={"Threshold": 0.5, "Resolution": "2 mm"})
            write_json(content, request.sidecar(key, member, space))
    figures = output_dir / f"sub-{scan.subject}" / "figures"
    write_text("png", figures / figure_name(scan.prefix, "entropy"))
    write_text("<html></html>", names.report(output_dir, scan.subject))


@pytest.fixture(scope="module", params=["beside", "inside", "elsewhere"])
def errors(tmp_path_factory, request):
    """Validator's errors on a dataset with every output, for three places of the input."""
    root = tmp_path_factory.mktemp("deriv")
    raw = root / "raw"
    out = {
        "beside": root / "out",
        "inside": raw / "derivatives" / "bids_varaug",
        "elsewhere": root / "a" / "b" / "out",
    }[request.param]
    raw.mkdir()
    (raw / "dataset_description.json").write_text(json.dumps({"Name": "x", "BIDSVersion": "1.8.0"}))
    for folder, prefixes in PREFIXES.items():
        for prefix in prefixes:
            relative = f"{folder}/{prefix}_T1w.nii.gz"
            subject = prefix.split("_")[0].removeprefix("sub-")
            _write_outputs(out, Scan(raw / relative, {"subject": subject}, relative))
    sidecars.write_dataset_files(_run(raw, out))
    write_text("a = 1\n", names.logs(out) / "run.toml")
    Citation("x").write(names.logs(out))
    write_text("x\n", out / "sourcedata" / "freesurfer" / "sub-01" / "stats" / "aseg.stats")
    write_text("a\tb\n1\t2\n", out / names.GROUP_MAPS / f"space-{COARSE.name}_res-2_regions.tsv")
    write_text("crash\n", names.logs(out) / "crash-1.txt")
    return run_validator(out)


def test_all_outputs_pass_the_schema_validator(errors):
    assert errors == []


def test_validator_would_see_a_wrong_name(tmp_path):
    sidecars.write_dataset_files(_run(tmp_path, tmp_path))
    path = tmp_path / "sub-01" / "anat" / "sub-01_varaug-1_dseg.nii.gz"
    io.write_image(np.ones((8, 8, 8), "uint8"), np.eye(4), path)
    assert run_validator(tmp_path) != []
