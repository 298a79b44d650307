"""Segment one image from a script, a notebook or ``bids_varaug-segment``: no BIDS needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, cast

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.spatialimages import SpatialImage

from bids_varaug.derivatives.citation import cite_participant
from bids_varaug.derivatives.names import DATASET_DESCRIPTION, ScanRequest, logs
from bids_varaug.derivatives.scan import write_scan
from bids_varaug.derivatives.sidecars import write_dataset_files
from bids_varaug.errors import OutputError, ScanError, UsageError
from bids_varaug.images.conform import prepare_head
from bids_varaug.images.fastsurfer import prepare_volume
from bids_varaug.inputs.scans import Scan
from bids_varaug.machine import MAX_DEFAULT_THREADS, available_processors
from bids_varaug.reports.participant import scan_report, write_subject_report
from bids_varaug.segmentation.fuse import Summary, summarise_members
from bids_varaug.segmentation.predict import crop_with_member, segment_with_member
from bids_varaug.settings import Settings
from bids_varaug.workflows.plan import Plan, make_plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def segment(
    image: str | os.PathLike | SpatialImage,
    *,
    ensemble: str | os.PathLike = "aseg31",
    members: str | Sequence[str] = "all",
    n_members: int | None = None,
    perturb_inference: int = 0,
    write_members: bool = False,
    family_maps: bool = False,
    device: str = "auto",
    n_threads: int | None = None,
    trust: str | None = None,
    random_seed: int = 0,
    sloppy: bool = False,
    whole_voxels: bool = False,
) -> Segmentation:
    """Segment one T1w image with an ensemble and measure how its members disagree.

    The labels are those of ``bids_varaug BIDS_DIR OUTPUT_DIR participant``. Intermediate results (60 MB for each
    member) go to a temporary folder.

    Parameters
    ----------
    image : path of a ``.nii`` or ``.nii.gz``, or nibabel image: one 3D volume, of any orientation
    ensemble : shipped ensemble, or the folder of one
    members : "all", families ("mca", "seed", "ieee") or single members ("mca01")
    n_members : use the first n of each family; all if None
    perturb_inference : how often to run the baseline with random rounding too
    write_members, family_maps : whether `Segmentation.save` also writes the labels of each member, the maps of each
        family
    device : "auto", "cpu", "cuda" or "cuda:N"
    n_threads : default: all processors, up to 8
    trust : "sform" or "qform", to use where the two contradict each other
    random_seed : of `perturb_inference`
    sloppy : 2 mm grid; one member of each family unless `members` or `n_members` say more; for tests and demos only
    whole_voxels : with FastSurfer's networks, conform without its shift by half a voxel where sizes are odd

    Raises
    ------
    ScanError, EnsembleError, UsageError
        If the image cannot be used, or the ensemble, a member or the device does not exist.

    Examples
    --------
    >>> result = segment("sub-01_T1w.nii.gz", members="seed")  # doctest: +SKIP
    >>> result.labels.shape  # doctest: +SKIP
    (256, 256, 256)
    >>> import numpy
    >>> segment(numpy.zeros((64, 64, 64)))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    bids_varaug.errors.ScanError: an array has no affine, so left and right cannot be told apart. Pass a file, ...
    """
    allowed = {
        "members: name at least one": bool(members),
        f"n_members={n_members!r}: must be 1 or more, or None": n_members is None or n_members >= 1,
        f"perturb_inference={perturb_inference!r}: must be 0 or more": perturb_inference >= 0,
        f"trust={trust!r}: must be sform, qform or None": trust in (None, "sform", "qform"),
    }
    for message, is_allowed in allowed.items():
        if not is_allowed:
            raise UsageError(message)
    folder = Path(tempfile.mkdtemp(prefix="bids_varaug-"))
    try:
        path = _as_file(image, folder)
        settings = Settings(
            path.parent, folder / "derivatives", "participant", folder / "work",
            ensemble=os.fspath(ensemble), members=(members,) if isinstance(members, str) else tuple(members),
            n_members=n_members, perturb_inference=perturb_inference, write_members=write_members,
            family_maps=family_maps, device=device, trust=trust, random_seed=random_seed, sloppy=sloppy,
            whole_voxels=whole_voxels,
            omp_nthreads=n_threads or min(available_processors(), MAX_DEFAULT_THREADS),
        )  # fmt: skip
        plan = make_plan(settings)
        label = Scan(path, {}, "").prefix.removeprefix("sub-").partition("_")[0]
        request = plan.request(Scan(path, {"subject": label}, path.name))
        settings.work_dir.mkdir()
        write_scan(request, *_run_steps(plan, path), settings.work_dir, settings.omp_nthreads)
        shutil.rmtree(settings.work_dir)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    result = Segmentation(request)
    weakref.finalize(result, shutil.rmtree, folder, ignore_errors=True)
    return result


class Segmentation:
    """What `segment` found, on the image's own grid.

    Without two perturbed members there is no spread; `entropy` is then None.

    Attributes
    ----------
    labels : nibabel image, consensus, FreeSurfer ids
    entropy : nibabel image, of the members' votes [bit]
    uncertainty : nibabel image, total entropy of the members' mean posterior [bit]
    unreliable : nibabel image, mask of the voxels whose label is wrong with a probability of 0.37 or more
    volumes : DataFrame, structure x member [mm3]
    regions : DataFrame, variability and verdict of each structure, see ``docs/reference/outputs.md``
    warnings : list of str, what speaks against the image or the segmentation
    """

    def __init__(self, request: ScanRequest):
        self._request = request

    def __repr__(self) -> str:
        members = " ".join(member.id for member in self._request.members)
        return f"<Segmentation of {self._request.scan.path.name} by {members}>"

    @property
    def labels(self) -> nib.Nifti1Image:  # noqa: D102
        return cast(nib.Nifti1Image, self.image("consensus_dseg"))

    @property
    def entropy(self) -> nib.Nifti1Image | None:  # noqa: D102
        return self.image("entropy")

    @property
    def uncertainty(self) -> nib.Nifti1Image:  # noqa: D102
        return cast(nib.Nifti1Image, self.image("total_entropy"))

    @property
    def unreliable(self) -> nib.Nifti1Image:  # noqa: D102
        return cast(nib.Nifti1Image, self.image("unreliable_mask"))

    def image(self, output: str) -> nib.Nifti1Image | None:
        """Return any image, None if it was not made.

        Parameters
        ----------
        output : "consensus_dseg", "ieee_dseg", "mean_probseg", "brain_mask", "unreliable_mask", "total_entropy",
            "mutual_information", "entropy", "sigbits" or "std"
        """
        path = self._request.path(output)
        if not path.exists():
            return None
        image = nib.Nifti1Image.from_filename(path)  # read at once: the file is removed with this object
        if image.ndim == 3:
            data = np.asanyarray(image.dataobj)
            data = data.astype(np.float32) if data.dtype.kind == "f" else data
        else:
            data = np.empty(image.shape, np.float32)
            for k in range(image.shape[3]):  # nibabel would scale all volumes at once in float64
                data[..., k] = image.dataobj[..., k]
        found = nib.Nifti1Image(data, image.affine, image.header)
        found.set_data_dtype(data.dtype)
        return found

    @property
    def volumes(self) -> pd.DataFrame:  # noqa: D102
        table = self._table("members_tsv")
        wide = table.pivot(index="name", columns="member", values="volume")
        return wide.loc[table["name"].unique(), table["member"].unique()]

    @property
    def regions(self) -> pd.DataFrame:  # noqa: D102
        return self._table("regions_tsv").set_index("name")

    def _table(self, output: str) -> pd.DataFrame:
        return pd.read_csv(self._request.path(output), sep="\t", na_values="n/a")

    @property
    def warnings(self) -> list[str]:  # noqa: D102
        return json.loads(self._request.sidecar("regions_tsv").read_text(encoding="utf-8"))["Warnings"]

    @cached_property
    def _figures(self) -> dict[str, bytes]:
        return dict(scan_report(self._request).figures)

    def plot(self, what: str = "consensus") -> Figure:
        """Draw a figure of the report; ValueError if there is none.

        Parameters
        ----------
        what : "consensus", "total_entropy", "mutual_information", "entropy", "sigbits", "std", "unreliable" or
            "volumes"
        """
        from matplotlib import image, pyplot

        if what not in self._figures:
            raise ValueError(f"no figure {what!r}; there are {', '.join(self._figures)}")
        picture = image.imread(BytesIO(self._figures[what]))
        figure = pyplot.figure(figsize=(12, 12 * picture.shape[0] / picture.shape[1]))
        figure.add_axes((0, 0, 1, 1)).imshow(picture)
        figure.axes[0].set_axis_off()
        return figure

    def save(self, output_dir: str | os.PathLike, report: bool = False) -> list[Path]:
        """Copy images and tables with their sidecars, how to cite, and a `report`, to a new or an empty folder.

        Returns the files.

        Raises as `check_output_dir`.
        """
        output_dir = Path(output_dir).absolute()
        check_output_dir(output_dir)
        made = self._request.settings
        shutil.copytree(made.output_dir, output_dir, dirs_exist_ok=True)
        request = replace(self._request, settings=replace(made, output_dir=output_dir))
        write_dataset_files(request)
        cite_participant(request).write(logs(output_dir))
        if report:
            write_subject_report([request])
        return sorted(path for path in output_dir.rglob("*") if path.is_file())


def check_output_dir(output_dir: Path) -> None:
    """Refuse a folder to save to, and make none.

    `UsageError` if it is a BIDS dataset or not empty, `OutputError` if it cannot be written.
    """
    if (output_dir / DATASET_DESCRIPTION).exists():
        raise UsageError(
            f"{output_dir}: this is a BIDS dataset. For its images, run `bids_varaug BIDS_DIR OUTPUT_DIR participant`; "
            "for one image, choose an empty folder."
        )
    made = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if any(output_dir.iterdir()):
            raise UsageError(f"{output_dir}: the folder is not empty. Choose another, or empty it.")
        tempfile.TemporaryFile(dir=output_dir).close()
        for folder in made:
            folder.rmdir()
    except OSError as error:
        raise OutputError(f"{output_dir}: cannot be written ({error.strerror}). Choose another folder.") from error


def _run_steps(plan: Plan, path: Path) -> tuple[Path, list[Path], Summary]:
    """Run the steps of `workflows.participant.init_scan_wf` one after another, in this process."""
    settings, ensemble, folder = plan.settings, str(plan.ensemble.directory), plan.settings.work_dir
    where = settings.device, settings.omp_nthreads
    if plan.ensemble.is_fastsurfer:
        head, geometry = prepare_volume(path, settings.trust, settings.whole_voxels)
    else:
        head, geometry = prepare_head(path, plan.voxel_size, plan.ensemble.multiple, settings.trust)
    if not settings.sloppy and not plan.ensemble.is_fastsurfer:
        head, geometry = crop_with_member(head, geometry, ensemble, plan.locator, *where)
    posteriors = [folder / f"{member.id}.safetensors" for member in plan.members]
    for member, file in zip(plan.members, posteriors, strict=True):
        segment_with_member(head, geometry, ensemble, member, file, *where)
    geometry.save(folder / "geometry.json")
    families = [member.family for member in plan.members]
    summary = summarise_members(posteriors, families, plan.ensemble.temperature, folder, settings.family_maps)
    return folder / "geometry.json", posteriors, summary


def _as_file(image: str | os.PathLike | SpatialImage, folder: Path) -> Path:
    """Path of an image; one that is only in memory is written to `folder`."""
    if isinstance(image, (str, os.PathLike)):
        return Path(image).absolute()
    if not isinstance(image, SpatialImage):
        raise ScanError(
            f"{'an array' if hasattr(image, 'ndim') else type(image).__name__} has no affine, so left and right "
            "cannot be told apart. Pass a file, or nibabel.Nifti1Image(array, affine)."
        )
    file = Path(image.get_filename() or "image.nii")
    if nib.is_proxy(image.dataobj) and file.name.endswith((".nii", ".nii.gz")) and file.is_file():
        there = nib.load(file)
        if isinstance(there, SpatialImage) and np.array_equal(there.affine, image.affine):
            return file.absolute()
    data = np.asanyarray(image.dataobj)
    if data.dtype.name in ("bool", "int64", "uint64", "float16"):  # that NIfTI or others lack
        data = data.astype(np.float32)
    path = folder / (re.sub(r"\.nii(\.gz)?$", "", file.name) + ".nii")
    nib.save(nib.Nifti1Image(data, image.affine), path)
    return path
