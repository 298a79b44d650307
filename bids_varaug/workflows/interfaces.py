"""Thin shells that let nipype call the pure functions: load, call, save."""

# ruff: noqa: D106, N801  # nipype calls the specifications so

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from nipype.interfaces.base import BaseInterfaceInputSpec, SimpleInterface, TraitedSpec
from nipype.interfaces.base.support import Bunch
from nipype.interfaces.base.traits_extension import File, InputMultiPath, isdefined, traits
from safetensors import SafetensorError

from bids_varaug.errors import ScanError, UserError
from bids_varaug.workflows.plan import record_finished

# Torch takes seconds to import: what needs it is imported in the worker that runs the step.


class _Step(SimpleInterface):
    """A step that shows at once what a user can fix; its node then fails."""

    def _run_interface(self, runtime: Bunch) -> Bunch:
        folder = Path(runtime.cwd)
        try:
            self._results |= self._step(folder)
        except Exception as error:
            message = str(error)
            if isinstance(error, OSError | SafetensorError):
                # Outputs have errors of their own; this is the work directory, full as a rule.
                what = f"{folder}: cannot read or write the work directory ({error}). Free some space there and"
                message = f"{what} resume with the same -w, or choose another -w."
            # torch has no error of its own for this on the CPU.
            elif isinstance(error, MemoryError) or "allocate memory" in message:
                what = f"{folder}: not enough memory for this step ({error}). Provide more memory, or run fewer steps"
                message = f"{what} at once (--nprocs), and resume with the same -w."
            elif not isinstance(error, UserError):
                raise
            print(f"ERROR: {message}", file=sys.stderr)
            raise
        return runtime


class _NetworkInput(BaseInterfaceInputSpec):
    # Its text, by which nipype knows it, holds the checksum of the weights and the seed.
    member = traits.Any(desc="models.ensemble.Member")
    # Where and how it runs does not change what comes out.
    ensemble = traits.Str(mandatory=True, nohash=True, desc="name or folder")
    device = traits.Str("cpu", usedefault=True, nohash=True)
    num_threads = traits.Int(1, usedefault=True, nohash=True)


class Conform(_Step):
    """Bring a T1w image to the network grid; cut out the head, or the brain if given a member."""

    class input_spec(_NetworkInput):
        in_file = File(exists=True, mandatory=True, desc="T1w image")
        voxel_size = traits.Float(mandatory=True, desc="of the network grid, mm")
        multiple = traits.Int(mandatory=True, desc="sides of the head box are multiples of this")
        trust = traits.Enum(None, "sform", "qform", usedefault=True, desc="form of the header to take")
        whole_voxels = traits.Bool(False, usedefault=True, desc="of FastSurfer: without its half-voxel shift")
        fastsurfer = traits.Bool(False, usedefault=True, desc="FastSurfer's rules and grid, the others do not count")

    class output_spec(TraitedSpec):
        head_file = File(exists=True, desc="part of the head, .npy float32; of FastSurfer, all of it, uint8")
        geometry_file = File(exists=True, desc="grids and box, JSON")

    def _step(self, folder: Path) -> dict[str, Path]:
        from bids_varaug.images.conform import prepare_head
        from bids_varaug.images.fastsurfer import prepare_volume

        inputs = self.inputs
        path = Path(inputs.in_file)
        try:
            if inputs.fastsurfer:
                head, geometry = prepare_volume(path, inputs.trust, inputs.whole_voxels)
            else:
                head, geometry = prepare_head(path, inputs.voxel_size, inputs.multiple, inputs.trust)
        except ScanError as error:
            raise ScanError(f"{error} To leave the image out, use --bids-filter-file.") from error
        for warning in geometry.warnings:
            print(f"WARNING: {inputs.in_file}: {warning}", file=sys.stderr)
        if isdefined(inputs.member):
            from bids_varaug.segmentation.predict import crop_with_member

            where = inputs.ensemble, inputs.member, inputs.device, inputs.num_threads
            head, geometry = crop_with_member(head, geometry, *where)
        head_file, geometry_file = folder / "head.npy", folder / "geometry.json"
        np.save(head_file, head)
        geometry.save(geometry_file)
        return {"head_file": head_file, "geometry_file": geometry_file}


class SegmentMember(_Step):
    """Segment a head with one member."""

    class input_spec(_NetworkInput):
        head_file = File(exists=True, mandatory=True, desc="part of the head, .npy")
        geometry_file = File(exists=True, mandatory=True, desc="grids and box, JSON")

    class output_spec(TraitedSpec):
        posterior_file = File(exists=True, desc="sparse posterior, safetensors")

    def _step(self, folder: Path) -> dict[str, Path]:
        from bids_varaug.images.conform import Geometry
        from bids_varaug.segmentation.predict import segment_with_member

        inputs, path = self.inputs, folder / f"{self.inputs.member.id}.safetensors"
        head, geometry = np.load(inputs.head_file), Geometry.load(Path(inputs.geometry_file))
        where = inputs.device, inputs.num_threads
        segment_with_member(head, geometry, inputs.ensemble, inputs.member, path, *where)
        return {"posterior_file": path}


class FuseMembers(_Step):
    """Make the consensus of the perturbed members, and the maps and counts of their spread."""

    class input_spec(BaseInterfaceInputSpec):
        posterior_files = InputMultiPath(File(exists=True), mandatory=True)
        families = traits.List(traits.Str, mandatory=True, desc="family of each posterior")
        temperature = traits.Float(mandatory=True, desc="of the ensemble")
        family_maps = traits.Bool(False, usedefault=True, desc="whether to map each family too")

    class output_spec(TraitedSpec):
        mean_file = File(exists=True, desc="mean posterior of the consensus, safetensors")
        maps_file = File(exists=True, desc="segmentation.fuse.MAPS on the head box, .npz")
        counts_file = File(exists=True, desc="volumes, overlaps, entropies, soft Dice, .npz")

    def _step(self, folder: Path) -> dict[str, Path]:
        from bids_varaug.segmentation.fuse import summarise_members

        inputs, paths = self.inputs, [Path(file) for file in self.inputs.posterior_files]
        files = summarise_members(paths, inputs.families, inputs.temperature, folder, inputs.family_maps)
        return {f"{name}_file": path for name, path in files._asdict().items()}


class Register(_Step):
    """Register one posterior to the template."""

    class input_spec(BaseInterfaceInputSpec):
        posterior_file = File(exists=True, mandatory=True, desc="sparse posterior, safetensors")
        geometry_file = File(exists=True, mandatory=True)
        label_ids = traits.List(traits.Int, mandatory=True, desc="of the ensemble's classes, background first")
        n_iterations = traits.Int(mandatory=True, desc="of the deformation; 0: affine only")
        name = traits.Str(mandatory=True, nohash=True, desc="of the image, for messages")

    class output_spec(TraitedSpec):
        registration_file = File(exists=True, desc="registration.transforms.Registration, .npz")

    def _step(self, folder: Path) -> dict[str, Path]:
        from bids_varaug.registration.register import register_file

        inputs, path = self.inputs, folder / "registration.npz"
        posterior, geometry = Path(inputs.posterior_file), Path(inputs.geometry_file)
        register_file(posterior, geometry, inputs.label_ids, inputs.n_iterations, inputs.name, path)
        return {"registration_file": path}


class WriteScan(_Step):
    """Bring labels and maps to the T1w's own grid and write the derivatives."""

    class input_spec(BaseInterfaceInputSpec):
        request = traits.Any(mandatory=True, desc="derivatives.names.ScanRequest")
        geometry_file = File(exists=True, mandatory=True)
        mean_file = File(exists=True, mandatory=True)
        maps_file = File(exists=True, mandatory=True)
        counts_file = File(exists=True, mandatory=True)
        posterior_files = InputMultiPath(File(exists=True), mandatory=True)
        registration_files = InputMultiPath(File(exists=True), desc="of the consensus, then of the perturbed members")
        num_threads = traits.Int(1, usedefault=True, nohash=True)

    class output_spec(TraitedSpec):
        out_files = traits.List(File(exists=True), desc="derivatives of the scan")

    always_run = True  # the output folder may have been emptied since

    def _step(self, folder: Path) -> dict[str, list[Path]]:
        from bids_varaug.derivatives.scan import write_scan
        from bids_varaug.segmentation.fuse import Summary

        inputs, request = self.inputs, self.inputs.request
        summary = Summary(Path(inputs.mean_file), Path(inputs.maps_file), Path(inputs.counts_file))
        posteriors = [Path(file) for file in inputs.posterior_files]
        written, warnings = write_scan(
            request, Path(inputs.geometry_file), posteriors, summary, folder, inputs.num_threads
        )
        if isdefined(inputs.registration_files):
            from bids_varaug.derivatives.in_space import write_in_spaces

            written += write_in_spaces(request, Path(inputs.geometry_file), inputs.registration_files)
        if warnings:
            warning = f"WARNING: {request.scan.path}: {' '.join(warnings)}"
            print(warning, f"See sub-{request.scan.subject}.html.", file=sys.stderr)
        if request.settings.clean_workdir:
            record_finished(request, written, folder.parent)
        return {"out_files": written}


class WriteReport(_Step):
    """Draw a participant's report from the derivatives."""

    class input_spec(BaseInterfaceInputSpec):
        requests = traits.Any(mandatory=True, desc="a ScanRequest for each scan of the participant")
        derivatives = traits.List(mandatory=True, desc="written files; only their being there matters")

    always_run = True

    def _step(self, folder: Path) -> dict[str, Path]:
        from bids_varaug.reports.participant import write_subject_report

        write_subject_report(self.inputs.requests)
        return {}
