"""Thin shells that let nipype call the pure functions: load, call, save."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import numpy as np
from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    InputMultiPath,
    SimpleInterface,
    TraitedSpec,
    isdefined,
    traits,
)
from safetensors import SafetensorError

from bids_varaug.errors import UserError
from bids_varaug.workflows.finished import record_finished
from bids_varaug.workflows.workers import LOG_LEVEL

# Workers import this module before they run their first node.
logging.getLogger("nipype.workflow").setLevel(os.environ.get(LOG_LEVEL, "INFO"))


class _Step(SimpleInterface):
    """A step that shows at once what a user can mend; its node then fails."""

    def _run_interface(self, runtime):
        try:
            self._results |= self._step(Path(runtime.cwd))
        except UserError as error:
            print(f"ERROR: {error}", file=sys.stderr, flush=True)
            raise
        except (OSError, SafetensorError) as error:
            # Outputs have errors of their own; this is the work directory, full as a rule.
            print(
                f"ERROR: {runtime.cwd}: cannot read or write the work directory ({error}). Free "
                "some space there or give -w another place; the same -w goes on from here.",
                file=sys.stderr,
                flush=True,
            )
            raise
        except (MemoryError, RuntimeError) as error:
            # torch has no error of its own for this on the CPU.
            if isinstance(error, MemoryError) or "allocate memory" in str(error):
                print(
                    f"ERROR: {runtime.cwd}: not enough memory for this step ({error}). Give more "
                    "memory, or run fewer steps at once (--nprocs); the same -w goes on from here.",
                    file=sys.stderr,
                    flush=True,
                )
            raise
        return runtime


class _ConformInput(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="T1w image")
    voxel_size = traits.Float(mandatory=True, desc="of the network grid, mm")
    multiple = traits.Int(mandatory=True, desc="sides of the head box are multiples of this")
    trust = traits.Enum(None, "sform", "qform", usedefault=True, desc="form of the header to take")


class _HeadOutput(TraitedSpec):
    head_file = File(exists=True, desc="part of the head, .npy float32, network grid")
    geometry_file = File(exists=True, desc="grids and box, JSON")


def _save_head(folder: Path, head: np.ndarray, geometry) -> dict:
    files = {"head_file": folder / "head.npy", "geometry_file": folder / "geometry.json"}
    np.save(files["head_file"], head)
    geometry.save(files["geometry_file"])
    return {name: str(path) for name, path in files.items()}


class Conform(_Step):
    """Bring a T1w image to the network grid and cut out the head."""

    input_spec, output_spec = _ConformInput, _HeadOutput

    def _step(self, folder: Path) -> dict:
        from bids_varaug.images.conform import prepare_head

        head, geometry = prepare_head(
            Path(self.inputs.in_file), self.inputs.voxel_size, self.inputs.multiple,
            self.inputs.trust,
        )  # fmt: skip
        for doubt in geometry.warnings:
            print(f"WARNING: {self.inputs.in_file}: {doubt}", file=sys.stderr, flush=True)
        return _save_head(folder, head, geometry)


class _SegmentInput(BaseInterfaceInputSpec):
    head_file = File(exists=True, mandatory=True, desc="part of the head, .npy")
    # Its text, by which nipype knows it, holds the checksum of the weights and the seed.
    member = traits.Any(mandatory=True, desc="models.ensemble.Member")
    identity = traits.Str(mandatory=True, desc="models.ensemble.identify of it; not read")
    # Where and how it runs does not change what comes out.
    ensemble = traits.Str(mandatory=True, nohash=True, desc="name or folder")
    device = traits.Str("cpu", usedefault=True, nohash=True)
    num_threads = traits.Int(1, usedefault=True, nohash=True)


class _LocateInput(_SegmentInput):
    geometry_file = File(exists=True, mandatory=True)


class LocateBrain(_Step):
    """Cut the part that holds the brain out of a head box."""

    input_spec, output_spec = _LocateInput, _HeadOutput

    def _step(self, folder: Path) -> dict:
        from bids_varaug.images.conform import Geometry
        from bids_varaug.segmentation.member import crop_with_member

        head, geometry = crop_with_member(
            np.load(self.inputs.head_file), Geometry.load(Path(self.inputs.geometry_file)),
            self.inputs.ensemble, self.inputs.member, self.inputs.device, self.inputs.num_threads,
        )  # fmt: skip
        return _save_head(folder, head, geometry)


class _SegmentMemberInput(_SegmentInput):
    offset = traits.Any(desc="of the grid to segment on, see segmentation.grids; absent: none")
    shift_file = File(exists=True, desc="what several grids add, safetensors")


class _SegmentOutput(TraitedSpec):
    posterior_file = File(exists=True, desc="sparse posterior, safetensors")


class SegmentMember(_Step):
    """Segment a head with one member."""

    input_spec, output_spec = _SegmentMemberInput, _SegmentOutput

    def _step(self, folder: Path) -> dict:
        from bids_varaug.segmentation.member import segment_with_member

        path = folder / f"{self.inputs.member.id}.safetensors"
        offset = self.inputs.offset if isdefined(self.inputs.offset) else (0, 0, 0)
        shift = Path(self.inputs.shift_file) if isdefined(self.inputs.shift_file) else None
        segment_with_member(
            np.load(self.inputs.head_file), self.inputs.ensemble, self.inputs.member, path,
            self.inputs.device, self.inputs.num_threads, offset, shift,
        )  # fmt: skip
        return {"posterior_file": str(path)}


class _AverageInput(BaseInterfaceInputSpec):
    posterior_files = InputMultiPath(File(exists=True), mandatory=True, desc="one for each grid")
    member = traits.Any(mandatory=True, desc="models.ensemble.Member whose they are")
    n_grids = traits.Int(mandatory=True, desc="which grids, see segmentation.grids.GRIDS")


class _AverageOutput(TraitedSpec):
    posterior_file = File(exists=True, desc="mean posterior, on the first grid, safetensors")
    shift_file = File(exists=True, desc="that minus the first, safetensors")


class AverageGrids(_Step):
    """Average the posteriors of one member on several grids."""

    input_spec, output_spec = _AverageInput, _AverageOutput

    def _step(self, folder: Path) -> dict:
        from bids_varaug.segmentation.average import average_grids
        from bids_varaug.segmentation.grids import GRIDS
        from bids_varaug.segmentation.member import describe_member

        paths = [Path(file) for file in self.inputs.posterior_files]
        mean, shift = folder / f"{self.inputs.member.id}.safetensors", folder / "shift.safetensors"
        note = describe_member(self.inputs.member)
        average_grids(paths, GRIDS[self.inputs.n_grids], mean, shift, note)
        return {"posterior_file": str(mean), "shift_file": str(shift)}


class _FuseInput(BaseInterfaceInputSpec):
    posterior_files = InputMultiPath(File(exists=True), mandatory=True)
    families = traits.List(traits.Str, mandatory=True, desc="family of each posterior")


class _FuseOutput(TraitedSpec):
    mean_file = File(exists=True, desc="mean posterior of the consensus, safetensors")
    maps_file = File(exists=True, desc="entropy, std, sigbits, unreliable on the head box, .npz")
    counts_file = File(exists=True, desc="volumes, overlaps, mean entropy of all members, .npz")


class FuseMembers(_Step):
    """Make the consensus of the perturbed members, and the maps and counts of their spread."""

    input_spec, output_spec = _FuseInput, _FuseOutput

    def _step(self, folder: Path) -> dict:
        from bids_varaug.segmentation.summary import summarise_members

        files = {name: folder / f"{name}.npz" for name in ("maps", "counts")}
        mean = folder / "mean.safetensors"
        summary = summarise_members(
            [Path(f) for f in self.inputs.posterior_files], self.inputs.families, mean
        )
        np.savez(files["maps"], **summary.maps)
        np.savez(files["counts"], **summary.counts)
        return {"mean_file": str(mean)} | {f"{k}_file": str(v) for k, v in files.items()}


class _WriteInput(BaseInterfaceInputSpec):
    request = traits.Any(mandatory=True, desc="derivatives.scan.ScanRequest")
    geometry_file = File(exists=True, mandatory=True)
    mean_file = File(exists=True, mandatory=True)
    maps_file = File(exists=True, mandatory=True)
    counts_file = File(exists=True, mandatory=True)
    posterior_files = InputMultiPath(File(exists=True), mandatory=True)
    num_threads = traits.Int(1, usedefault=True, nohash=True)


class _WriteOutput(TraitedSpec):
    out_files = traits.List(File(exists=True), desc="derivatives of the scan")


class WriteScan(_Step):
    """Bring labels and maps to the T1w's own grid and write the derivatives."""

    input_spec, output_spec = _WriteInput, _WriteOutput
    always_run = True  # the output folder may have been emptied since

    def _step(self, folder: Path) -> dict:
        from bids_varaug.derivatives.scan import Intermediate, write_scan

        inputs = self.inputs
        intermediate = Intermediate(
            Path(inputs.geometry_file), Path(inputs.mean_file), Path(inputs.maps_file),
            Path(inputs.counts_file), tuple(Path(f) for f in inputs.posterior_files),
        )  # fmt: skip
        written, doubts = write_scan(inputs.request, intermediate, folder, inputs.num_threads)
        if doubts:
            scan = inputs.request.scan
            print(f"WARNING: {scan.path}: {' '.join(doubts)} See sub-{scan.subject}.html.",
                  file=sys.stderr, flush=True)  # fmt: skip
        if inputs.request.settings.clean_workdir:
            record_finished(inputs.request, written, folder)
        return {"out_files": [str(path) for path in written]}


class _ReportInput(BaseInterfaceInputSpec):
    request = traits.Any(mandatory=True, desc="reports.subject.ReportRequest")
    derivatives = traits.List(mandatory=True, desc="written files; only their being there matters")


class _ReportOutput(TraitedSpec):
    out_file = File(exists=True, desc="sub-<label>.html")


class WriteReport(_Step):
    """Draw a participant's report from the derivatives."""

    input_spec, output_spec = _ReportInput, _ReportOutput
    always_run = True

    def _step(self, folder: Path) -> dict:
        from bids_varaug.reports.subject import write_subject_report

        return {"out_file": str(write_subject_report(self.inputs.request))}
