"""Brainlife App: one T1w image to a parcellation volume, called by ``main``.

Reads ``config.json`` in the current folder. Writes ``parc/`` (datatype neuro/parcellation/volume),
``product.json``, and the whole BIDS derivatives to ``derivatives/``.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["NO_ET"] = "1"

import pandas as pd
from PIL import Image

from bids_varaug.cli.run import main as run_app
from bids_varaug.derivatives import names
from bids_varaug.errors import UserError
from bids_varaug.inputs.scans import Scan
from bids_varaug.models.ensemble import load_ensemble

PICTURES = {"consensus": "Consensus", "entropy": "Vote entropy, bit", "volumes": "Volumes"}
PICTURE_WIDTH = 600  # pixels; Brainlife keeps product.json in its database, so it must stay small
PICTURE_COLORS = 64
OPTIONS = ("ensemble", "members", "n_members", "perturb_inference", "random_seed")
SWITCHES = ("sloppy", "write_members")


def main() -> int:
    """Run the App in the current folder; returns the exit code of ``bids_varaug``."""
    try:
        config = json.loads(Path("config.json").read_text(encoding="utf-8"))
        scan = stage(config, Path("bids").resolve())
    except (OSError, ValueError) as error:
        print(f"ERROR: config.json: {error}", file=sys.stderr)
        return 1
    output_dir = Path("derivatives").resolve()
    code = run_app(arguments(config, output_dir))
    if code != 0:
        return code
    try:
        labels = load_ensemble(config.get("ensemble") or "aseg31").labels
    except UserError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return int(error.exit_code)
    write_parcellation(scan, output_dir, labels, Path("parc"))
    content = json.dumps(product(scan, output_dir), allow_nan=False)
    Path("product.json").write_text(content, encoding="utf-8")
    return 0


def stage(config: Mapping[str, Any], bids_dir: Path) -> Scan:
    """Copy the image into a BIDS dataset of its own, under the subject's and session's labels.

    Raises
    ------
    ValueError
        If the configuration names no image ``t1``.
    OSError
        If the image cannot be copied.
    """
    if not config.get("t1"):
        raise ValueError('it names no image, e.g. "t1": "t1.nii.gz"')
    source = Path(config["t1"])
    meta = next((entry.get("meta", {}) for entry in config.get("_inputs", [])), {})
    entities = {"subject": _label(meta.get("subject")) or "01"}
    folder, prefix = f"sub-{entities['subject']}", f"sub-{entities['subject']}"
    if session := _label(meta.get("session")):
        entities["session"] = session
        folder, prefix = f"{folder}/ses-{session}", f"{prefix}_ses-{session}"
    extension = ".nii" if source.name.endswith(".nii") else ".nii.gz"
    relative = f"{folder}/anat/{prefix}_T1w{extension}"
    shutil.rmtree(bids_dir, ignore_errors=True)  # of another configuration
    (bids_dir / relative).parent.mkdir(parents=True)
    # Not a link: the image may lie where the validator or a worker does not look.
    shutil.copyfile(source, bids_dir / relative)
    description = {"Name": "Brainlife", "BIDSVersion": "1.10.0", "DatasetType": "raw"}
    (bids_dir / names.DATASET_DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")
    return Scan(bids_dir / relative, entities, relative)


def _label(text: object) -> str:
    """What may stand in a BIDS label of a name that Brainlife allows."""
    return re.sub("[^0-9a-zA-Z]", "", "" if text is None else str(text))


def arguments(config: Mapping[str, Any], output_dir: Path) -> list[str]:
    """Command line of ``bids_varaug`` that a configuration asks for."""
    line = ["bids", str(output_dir), "participant", "-w", "work", "--skip-bids-validation"]
    for name in OPTIONS:
        if config.get(name) not in (None, ""):
            line += [f"--{name}", *str(config[name]).split()]
    return line + [f"--{name}" for name in SWITCHES if config.get(name)]


def _output(key: str, scan: Scan, output_dir: Path) -> Path:
    return output_dir / Path(scan.relative).parent / names.OUTPUTS[key].name(scan.prefix)


def write_parcellation(scan: Scan, output_dir: Path, labels, folder: Path) -> None:
    """Write datatype neuro/parcellation/volume: ``parc.nii.gz`` and ``label.json``."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(_output("consensus_dseg", scan, output_dir), folder / "parc.nii.gz")
    rows = []
    for label in labels:
        if label.index:  # not the background
            red, green, blue = bytes.fromhex(label.color.removeprefix("#"))
            rows.append(
                {
                    "name": label.name,
                    "label": str(label.index),
                    "voxel_value": label.index,
                    "r": red,
                    "g": green,
                    "b": blue,
                }
            )
    (folder / "label.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def product(scan: Scan, output_dir: Path) -> dict[str, Any]:
    """What Brainlife shows (pictures, a message) and keeps for queries (the table of regions)."""
    regions = pd.read_csv(_output("regions_tsv", scan, output_dir), sep="\t", na_values=["n/a"])
    shown: list[dict[str, str]] = []
    dice = regions.dropna(subset="dice_min")
    if len(dice):
        worst = dice.loc[dice["dice_min"].idxmin()]
        message = f"Least agreement: {worst['name']}, smallest Dice of two members "
        shown.append({"type": "info", "msg": f"{message}{worst['dice_min']:.3f}."})
    figures = output_dir / f"sub-{scan.subject}" / "figures"
    for key, name in PICTURES.items():
        picture = figures / f"{scan.prefix}_desc-{key}_T1w.png"
        if picture.exists():  # no entropy without spread
            encoded = base64.b64encode(shrink(picture)).decode()
            shown.append({"type": "image/png", "name": name, "base64": encoded})
    columns = [c for c in ("volume_mean", "volume_std", "cv", "dice_min") if c in regions]
    table = regions.set_index("name")[columns].astype(object)
    return {
        "brainlife": shown,
        "regions": table.where(table.notna(), None).to_dict("index"),
    }


def shrink(picture: Path) -> bytes:
    """PNG of a few tens of kilobytes."""
    with Image.open(picture) as image:
        height = round(image.height * PICTURE_WIDTH / image.width)
        small = image.convert("RGB").resize((PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.quantize(PICTURE_COLORS).save(stream, "PNG", optimize=True)
    return stream.getvalue()


if __name__ == "__main__":
    sys.exit(main())
