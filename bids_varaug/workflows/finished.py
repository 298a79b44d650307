"""``--clean-workdir``: what is known of an image after its steps are removed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from bids_varaug import __version__
from bids_varaug.atomic import write_json
from bids_varaug.derivatives.names import ScanRequest
from bids_varaug.models.ensemble import sha256_of

RECORD = "finished.json"
KEPT = "write"  # the step that leaves the record


def record_finished(request: ScanRequest, outputs: Sequence[Path], folder: Path) -> None:
    """Note in the folder of the step "write" what was written, sidecars too, for which request."""
    sidecars = (path.with_name(path.name.partition(".")[0] + ".json") for path in outputs)
    files = [*outputs, *(path for path in sidecars if path.is_file())]
    record = {"Request": _text_of(request), "SHA256": {str(path): sha256_of(path) for path in files}}
    write_json(record, folder / RECORD)


def is_finished(request: ScanRequest, scan_folder: Path) -> bool:
    """Whether all that an earlier run wrote for this request is as it was."""
    try:
        record = json.loads((scan_folder / KEPT / RECORD).read_text(encoding="utf-8"))
        digests = {path: sha256_of(Path(path)) for path in record["SHA256"]}
        return (record["Request"], record["SHA256"]) == (_text_of(request), digests)
    except (OSError, ValueError, KeyError, TypeError):
        return False  # absent or damaged: the steps run


def remove_steps(scan_folder: Path) -> None:
    """Remove the steps of a scan that is written, gigabytes, but for the record."""
    if (scan_folder / KEPT / RECORD).is_file():
        for step in scan_folder.iterdir():
            if step.name != KEPT:
                shutil.rmtree(step, ignore_errors=True)


def _text_of(request: ScanRequest) -> str:
    """All that the derivatives of a scan depend on; the ensemble's text has all checksums."""
    settings, scan = request.settings, request.scan
    status = scan.path.stat()
    return repr((
        __version__, settings.output_dir, settings.sloppy, settings.grids, settings.write_members,
        settings.family_maps, scan, status.st_size, status.st_mtime_ns, request.ensemble, request.members,
    ))  # fmt: skip
