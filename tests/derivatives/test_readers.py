"""Other programs read the derivatives, and those for FreeSurfer's."""

import gzip
import hashlib
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_varaug.derivatives.freesurfer import check_subjects, fastsurfer_measures
from bids_varaug.derivatives.names import ScanRequest
from bids_varaug.derivatives.sidecars import write_dataset_files
from bids_varaug.errors import UsageError
from bids_varaug.images.conform import Geometry
from bids_varaug.inputs.freesurfer import read_aseg_stats
from bids_varaug.models.ensemble import load_ensemble
from bids_varaug.segmentation.fuse import SparsePosterior, save_posterior, sparse_rows
from bids_varaug.segmentation.partial_volume import corrected_volumes
from tests.derivatives.test_scan import SHAPE, files, request_, write_scan

__all__ = ["files", "request_"]  # fixtures

LABELS = load_ensemble("aseg31").labels
COS, SIN = np.cos(0.2), np.sin(0.2)
TURN = np.array([[COS, -SIN, 0, 9], [SIN, COS, 0, -7], [0, 0, 1, 5], [0, 0, 0, 1]])
AFFINE = TURN @ np.array([[-0.8, 0, 0, 0], [0, 0, 1.25, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
"""Of an oblique image, with voxels of 1 mm3."""
MARKED = dict(zip([(2, 3, 4), (2, 3, 5), (3, 3, 4), (1, 1, 1)], [2, 3, 17, 17], strict=True))
"""Voxels and their FreeSurfer ids."""


@pytest.fixture
def request_of_aseg(request_, files, tmp_path) -> ScanRequest:
    """Four voxels of three structures of the shipped ensemble, on an oblique T1w of noise."""
    t1w = np.random.default_rng(0).integers(1, 200, SHAPE).astype(np.int16)
    nib.save(nib.Nifti1Image(t1w, AFFINE), request_.scan.path)
    grids = Geometry.load(files.geometry)
    replace(grids, native_affine=AFFINE, conformed_affine=AFFINE).save(files.geometry)
    ids = [label.index for label in LABELS]
    labels = np.zeros(SHAPE, np.uint8)
    for voxel, index in MARKED.items():
        labels[voxel] = ids.index(index)
    posterior = np.eye(len(ids), dtype=np.float32)[labels[labels > 0]]
    save_posterior(files.mean, SparsePosterior(labels, sparse_rows(posterior, labels.ravel() > 0)))
    counts = np.bincount(labels.ravel(), minlength=len(ids))
    members = np.stack([counts, counts, counts])
    members[2, ids.index(3)] = 3  # one more voxel than in the others: 2 on average
    measures = {name: np.zeros(len(ids)) for name in np.load(files.counts)}
    np.savez(files.counts, **measures | {"volumes": members, "intersections": np.tile(counts, (3, 3, 1))})
    settings = replace(request_.settings, freesurfer_dir=tmp_path / "fs")
    return replace(request_, settings=settings, ensemble=replace(request_.ensemble, labels=LABELS))


@pytest.fixture
def subject(request_of_aseg, files, tmp_path) -> Path:
    """The scan's folder in the subjects directory."""
    write_scan(request_of_aseg, files, tmp_path)
    return tmp_path / "fs" / "sub-01"


def read_table(path: Path) -> pd.DataFrame:
    """Read the table of a FreeSurfer stats file as scripts do."""
    lines = path.read_text().splitlines()
    (columns,) = (line.split()[2:] for line in lines if line.startswith("# ColHeaders"))
    rows = "\n".join(line for line in lines if not line.startswith("#"))
    return pd.read_csv(StringIO(rows), sep=r"\s+", names=columns)


def test_volume_is_the_segmentation_of_the_t1w_grid(subject, request_of_aseg):
    image, dseg = nib.load(subject / "mri" / "aseg.varaug.mgz"), nib.load(request_of_aseg.path("consensus_dseg"))
    assert np.array_equal(image.dataobj, dseg.dataobj) and image.get_data_dtype() == ">i2"
    assert image.affine == pytest.approx(AFFINE, abs=1e-5)
    assert {voxel: int(image.dataobj[voxel]) for voxel in MARKED} == MARKED


def test_pandas_reads_the_table_of_structures(subject, request_of_aseg):
    table = read_table(subject / "stats" / "aseg.stats")
    columns = "Index SegId NVoxels Volume_mm3 StructName normMean normStdDev normMin normMax normRange"
    assert list(table) == columns.split()
    known = {label.index: label.name for label in LABELS if label.index not in (0, 2, 3, 41, 42)}
    assert dict(zip(table["SegId"], table["StructName"], strict=True)) == known
    hippocampus = table.set_index("SegId").loc[17]
    t1w = np.asarray(nib.load(request_of_aseg.scan.path).dataobj)
    values = np.array([t1w[voxel] for voxel, index in MARKED.items() if index == 17], float)
    assert (hippocampus["NVoxels"], hippocampus["Volume_mm3"]) == (2, 2.0)
    measured = hippocampus[["normMean", "normStdDev", "normMin", "normMax", "normRange"]].astype(float).tolist()
    expected = [values.mean(), values.std(ddof=1), values.min(), values.max(), np.ptp(values)]
    assert measured == pytest.approx(expected, abs=1e-4)
    assert table.set_index("SegId").loc[53, "NVoxels":"Volume_mm3"].tolist() == [0, 0]


def test_measures_are_sums_of_structures(subject):
    """As asegstats2table finds them: by the beginning of the line, the value in the fourth field."""
    lines = (subject / "stats" / "aseg.stats").read_text().splitlines()
    wanted = {
        "# Measure BrainSeg, BrainSegVol,": 5, "# Measure lhCortex, lhCortexVol,": 2, "# Measure Cortex, CortexVol,": 2,
        "# Measure lhCerebralWhiteMatter, lhCerebralWhiteMatterVol,": 1, "# Measure rhCortex, rhCortexVol,": 0,
        "# Measure SubCortGray, SubCortGrayVol,": 2, "# Measure TotalGray, TotalGrayVol,": 4,
        "# Measure BrainSegNotVent, BrainSegVolNotVent,": 5,
    }  # fmt: skip
    for start, value in wanted.items():
        (line,) = (line for line in lines if line.startswith(start))
        assert float(line.split(",")[3]) == pytest.approx(value), start
    assert not any("eTIV" in line for line in lines)


def test_sloppy_volumes_say_so(subject, request_of_aseg, files, tmp_path):
    assert "--sloppy" not in (subject / "stats" / "aseg.stats").read_text()
    settings = replace(request_of_aseg.settings, sloppy=True)
    write_scan(replace(request_of_aseg, settings=settings), files, tmp_path)
    assert "# Made with --sloppy" in (subject / "stats" / "aseg.stats").read_text()


def test_mask_is_measured_in_the_t1w_grid(subject, request_of_aseg):
    text = (subject / "stats" / "aseg.stats").read_text()
    mask = nib.load(request_of_aseg.path("brain_mask"))
    volume = np.count_nonzero(mask.dataobj) * abs(np.linalg.det(mask.affine[:3, :3]))
    assert float(re.search(r"MaskVol, Mask Volume, ([\d.]+)", text)[1]) == pytest.approx(volume, rel=1e-5)


def test_our_own_reader_of_freesurfer_reads_it(subject, request_of_aseg):
    volumes = read_aseg_stats(subject / "stats" / "aseg.stats")
    regions = pd.read_csv(request_of_aseg.path("regions_tsv"), sep="\t", na_values="n/a")
    assert volumes == pytest.approx(regions.set_index("name")["volume_mean"].to_dict())


def test_spread_stands_in_a_table_beside(subject, request_of_aseg):
    beside = (subject / "stats" / "aseg.varaug.tsv").read_bytes()
    assert beside == request_of_aseg.path("regions_tsv").read_bytes()


def test_color_table_has_the_form_of_freesurfer(subject):
    lines = (subject.parent / "aseg.varaug.LUT.txt").read_text().splitlines()
    rows = [line.split() for line in lines if not line.startswith("#")]
    assert [(int(row[0]), row[1]) for row in rows] == [(0, "Unknown")] + [(x.index, x.name) for x in LABELS[1:]]
    assert rows[1][2:] == ["245", "245", "245", "0"]


def test_the_same_run_writes_the_same_bytes(subject, request_of_aseg, files, tmp_path):
    def digests() -> dict[Path, str]:
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in subject.parent.rglob("*.*")}

    before = digests()
    assert len(before) == 4
    write_scan(request_of_aseg, files, tmp_path)
    assert digests() == before
    assert gzip.open(subject / "mri" / "aseg.varaug.mgz").read(4) == b"\0\0\0\1"


def test_files_of_another_program_are_not_replaced(request_of_aseg, files, tmp_path):
    theirs = tmp_path / "fs" / "sub-01" / "stats" / "aseg.stats"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("# Title Segmentation Statistics\n# generating_program mri_segstats\n")
    with pytest.raises(UsageError, match=r"--freesurfer-dir .*another program made stats/aseg.stats of sub-01\."):
        check_subjects(tmp_path / "fs", [request_of_aseg.scan])
    unfinished = tmp_path / "unfinished" / "sub-01" / "mri" / "orig.mgz"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_bytes(b"")
    with pytest.raises(UsageError, match=r"another program made mri/orig.mgz of sub-01\."):
        check_subjects(tmp_path / "unfinished", [request_of_aseg.scan])
    with pytest.raises(UsageError, match="another program"):
        write_scan(request_of_aseg, files, tmp_path)
    assert "mri_segstats" in theirs.read_text() and not (tmp_path / "fs" / "sub-01" / "mri").exists()


def test_measures_of_fastsurfer_are_its_own(golden, shared_data):
    """From its volumes, to the six decimals given there, but for what has no label here: corpus callosum, vessels."""
    structures = pd.read_csv(golden / "segstats.tsv", sep="\t", index_col="name")
    volumes = structures["volume_mm3"]
    wanted = pd.read_csv(golden / "segstats_measures.tsv", sep="\t", index_col="field")["value"]
    callosum = volumes[volumes.index.str.startswith("CC_")].sum()
    for field, share in (("lhCerebralWhiteMatterVol", 0.5), ("rhCerebralWhiteMatterVol", 0.5),
                         ("CerebralWhiteMatterVol", 1)):  # fmt: skip
        wanted[field] -= share * callosum
    labels, image = (np.asanyarray(nib.load(shared_data / "t1w" / "bert" / f"bert_desc-{name}.nii.gz").dataobj)
                     for name in ("aparcDKTaseg_dseg", "norm_T1w"))  # fmt: skip
    vessels = corrected_volumes(labels, image, [*structures["id"], 30, 62])[-2:].sum()
    wanted[[field for field in wanted.index if field.startswith(("BrainSeg", "SupraTentorial"))]] -= vessels
    found = fastsurfer_measures(volumes, labels, 1.0)
    named = {text.split(", ")[1]: value for text, value in found.items()}
    assert named == pytest.approx(wanted.drop("MaskVol").to_dict(), abs=1e-5, rel=0)


def test_nilearn_measures_the_t1w_in_each_structure(subject, request_of_aseg):
    maskers = pytest.importorskip("nilearn.maskers")
    write_dataset_files(request_of_aseg)
    t1w, dseg = nib.load(request_of_aseg.scan.path), nib.load(request_of_aseg.path("consensus_dseg"))
    lut = pd.read_csv(request_of_aseg.settings.output_dir / "seg-varaug_dseg.tsv", sep="\t", na_values="n/a")
    masker = maskers.NiftiLabelsMasker(dseg, lut=lut, standardize=None)
    means = masker.fit_transform(t1w).ravel()
    values = np.asarray(t1w.dataobj)
    expected = {
        index: np.mean([values[voxel] for voxel, of in MARKED.items() if of == index]) for index in set(MARKED.values())
    }
    names = {label.index: label.name for label in LABELS}
    found = {masker.region_names_[n]: mean for n, mean in enumerate(means)}
    assert found == pytest.approx({names[index]: mean for index, mean in expected.items()})
