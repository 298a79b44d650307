"""Which affine of a NIfTI header to believe, and what it says about the voxels."""

from __future__ import annotations

from collections.abc import Mapping

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from scipy.linalg import polar

from bids_varaug.errors import ScanError

SAME_SIZE = 0.01  # relative difference of voxel sizes up to which the parts of a header agree
SAME_ANGLE = 3.0  # degrees between the axes of sform and qform up to which they agree
OBLIQUE = 5.0  # degrees between an axis of the image and of the scanner, beyond which the image is oblique

_TEMPLATES = {3: "Talairach", 4: "MNI152", 5: "another template"}
_MM_PER_UNIT = {1: ("metre", 1e3), 3: ("micron", 1e-3)}  # of xyzt_units; all others: mm
_FIX = "Correct the header (fslorient, nibabel, dcm2niix), or choose with --trust sform|qform."


def voxel_volume(affine: np.ndarray) -> float:
    """Return the volume of a voxel, mm3: the determinant, which a shear makes smaller than a box.

    >>> voxel_volume(np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1.0]]))
    2.0
    """
    return abs(float(np.linalg.det(affine[:3, :3])))


def is_oblique(affine: np.ndarray) -> bool:
    """Whether an axis lies more than `OBLIQUE` degrees off every axis of the scanner."""
    cosines = np.abs(affine[:3, :3] / voxel_sizes(affine)).max(axis=0)
    return bool(cosines.min() < np.cos(np.deg2rad(OBLIQUE)))


def in_mm(sizes: np.ndarray, form: str = ".4g") -> str:
    """Format sizes along the axes for a message.

    >>> in_mm(np.array([1, 1, 1.25]))
    '1 x 1 x 1.25 mm'
    """
    return f"{' x '.join(format(float(size), form) for size in sizes)} mm"


def choose_affine(name: str, header: nib.Nifti1Header, trust: str | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Choose between sform, qform and pixdim, and tell where they contradict each other.

    Where both forms are set and agree, the sform counts, as the NIfTI standard has it. Where they differ in voxel size
    or axes, a form in scanner space takes precedence over one in a template's; of two of the same kind the qform, which
    has the sizes of pixdim, if the sizes differ, else the sform. A lone sform of other sizes than pixdim keeps its axes
    and takes the sizes of pixdim (but where these are all 1, as in a header that nobody filled in).

    Returns the affine, (4, 4) float64, voxel -> mm, RAS+ world, and warnings. `trust` is "sform" or "qform" to take
    that one where both are set, or none is; `name` is that of the file, for messages. Raises `ScanError` if no form
    says where left and right are, or the two contradict each other in it.
    """
    codes = {form: int(header[f"{form}_code"]) for form in ("sform", "qform")}
    given = [form for form, code in codes.items() if code > 0] or ([trust] if trust else [])
    if not given:
        cause = "no orientation (qform_code and sform_code are 0 or unknown)"
        raise ScanError(f"{name}: {cause}, so left and right cannot be told apart. {_FIX}")
    if trust in given:
        given = [trust]
    unit, mm = _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, ("", 1.0))
    forms = {form: affine for form in given if (affine := _form(header, form, mm)) is not None}
    if not forms:
        raise ScanError(f"{name}: the affine has NaN or infinite values, or is singular ({', '.join(given)}). {_FIX}")
    chosen, warnings = _choose_form(name, forms, codes) if len(forms) == 2 else (next(iter(forms)), [])
    if len(forms) < len(given):
        warnings.append(f"Only the {chosen} of the header can be used; the other is damaged.")
    affine, template = forms[chosen], _TEMPLATES.get(codes[chosen])
    sizes, pixdim = voxel_sizes(affine), mm * np.abs(header["pixdim"][1:4])
    has_pixdim = np.isfinite(pixdim).all() and pixdim.all()
    if given != [trust] and len(forms) == 1 and has_pixdim and not _same_sizes(sizes, pixdim):
        used = f"{chosen} was"
        if (pixdim != mm).any() or template:  # 1 is what a header has that nobody filled in
            affine[:3, :3] = polar(affine[:3, :3])[0] * pixdim
            used = "sizes of pixdim were"
        forms_sizes = f"{chosen} with voxels of {in_mm(sizes)}, pixdim of {in_mm(pixdim)}"
        warnings.append(f"The header contradicts itself: {forms_sizes}. The {used} used. {_FIX}")
    if template:
        warnings.append(
            f"The header says that the image is in the space of a template (code {codes[chosen]}: {template}). If so, "
            "volumes are those in that space, not the person's."
        )
    if unit:
        warnings.append(f"The header gives lengths in {unit}s; they were converted.")
    return affine, tuple(warnings)


def _choose_form(name: str, forms: Mapping[str, np.ndarray], codes: Mapping[str, int]) -> tuple[str, list[str]]:
    sform, qform = (polar(form[:3, :3])[0] for form in forms.values())
    if np.linalg.det(sform) * np.linalg.det(qform) < 0:
        mirrored = "sform and qform are mirror images of each other"
        raise ScanError(f"{name}: {mirrored}, so left and right cannot be told apart. {_FIX}")
    angle = np.rad2deg(np.arccos(np.clip((np.trace(sform.T @ qform) - 1) / 2, -1, 1)))
    same_sizes = _same_sizes(*map(voxel_sizes, forms.values()))
    if same_sizes and angle <= SAME_ANGLE:
        return "sform", []
    in_template = [codes[form] in _TEMPLATES for form in forms]
    qform_first = in_template[0] if in_template[0] != in_template[1] else not same_sizes
    chosen = "qform" if qform_first else "sform"
    apart = f", {angle:.0f} degrees apart" if angle > SAME_ANGLE else ""
    parts = [f"{f} (code {codes[f]}) with voxels of {in_mm(voxel_sizes(forms[f]))}" for f in forms]
    return chosen, [f"The header contradicts itself: {' and '.join(parts)}{apart}. The {chosen} was used. {_FIX}"]


def _form(header: nib.Nifti1Header, form: str, mm: float) -> np.ndarray | None:
    """One form in mm; None where it is no affine."""
    try:
        with np.errstate(all="ignore"):
            affine = np.array(getattr(header, f"get_{form}")(), np.float64)
    except (ValueError, nib.spatialimages.HeaderDataError):
        return None
    affine[:3] *= mm
    usable = np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 0
    return affine if usable else None


def _same_sizes(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((np.abs(a / b - 1) <= SAME_SIZE).all())
