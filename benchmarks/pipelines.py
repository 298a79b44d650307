r"""How far last-bit noise moves traditional programs: several programs, several heads.

    pip install antspyx dipy
    python benchmarks/pipelines.py OUT --heads HEAD.nii.gz ... --template T.nii.gz [--programs ants-syn ...] [--n 10]
    python benchmarks/segment_heads.py OUT/heads --cache NETWORKS --rr 5
    python benchmarks/pipelines.py OUT --summarise [--networks NETWORKS]

HEAD are brain-extracted T1w images, or with skull for programs that do not mind. Each program runs once without noise
and N times with, on every head at 2 mm, by `bids_varaug-perturb`; what is there is not run again. `--summarise` prints
a row per program: heads, processor time over that without noise, calls of libm, SD of the warp, smallest Dice of
labels. With ``--networks`` it also prints how much the structures of the template, brought to the same heads by
ants-syn, vary, beside those of our networks: under random rounding at inference, and trained apart by rounding or seed.

ants-n4, ants-atropos, ants-syn: antspyx (one thread, fixed random seed). dipy-syn, dipy-affine: dipy.
elastix: ``elastix``, affine and B-splines. mrtrix: ``mrregister``, affine and non-linear.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import date
from importlib.resources import files
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from heads import print_markdown, read_cache
from nibabel.processing import resample_to_output
from scipy.stats import t as student_t

from bids_varaug.cli.perturb import compare_main, perturb_main
from bids_varaug.variability.measures import FLOAT64_BITS, RegionCounts, pairwise_dice, significant_bits

VOXEL_MM = 2.0
TEMPLATE_LABELS = files("bids_varaug") / "data" / "tpl-MNI152NLin2009cAsym_res-02_desc-aseg31_dseg.nii.gz"
PREPARE = "import ants, sys; image = ants.image_read(sys.argv[1]); fixed = ants.image_read(sys.argv[2]); "
CODE = {
    "ants-n4": PREPARE + "ants.image_write(ants.n4_bias_field_correction(image), sys.argv[3] + '/n4.nii.gz')",
    "ants-atropos": PREPARE
    + "mask = ants.get_mask(image, cleanup=2); "
    + "found = ants.atropos(a=image, x=mask, i='KMeans[3]', m='[0.2,1x1x1]', c='[5,0]'); "
    + "ants.image_write(found['segmentation'], sys.argv[3] + '/tissue_dseg.nii.gz')",
    "ants-syn": PREPARE
    + "found = ants.registration(fixed, image, 'SyN', outprefix=sys.argv[3] + '/syn_'); "
    + "ants.image_write(found['warpedmovout'], sys.argv[3] + '/warped.nii.gz'); "
    + "labels = ants.apply_transforms(image, ants.image_read(sys.argv[4]), found['invtransforms'], 'genericLabel'); "
    + "ants.image_write(labels, sys.argv[3] + '/aseg31_dseg.nii.gz')",
    "dipy-affine": "import sys, numpy as np; from dipy.align import affine_registration; "
    + "_, affine = affine_registration(sys.argv[1], sys.argv[2], pipeline=['center_of_mass', 'rigid', 'affine']); "
    + "np.savetxt(sys.argv[3] + '/affine.mat', affine)",
    "dipy-syn": "import sys, nibabel, numpy as np; from dipy.align import affine_registration, syn_registration; "
    + "moved, affine = affine_registration(sys.argv[1], sys.argv[2], pipeline=['center_of_mass', 'affine']); "
    + "fixed = nibabel.load(sys.argv[2]); "
    + "_, warp = syn_registration(moved, fixed, moving_affine=fixed.affine, level_iters=[20, 10, 5]); "
    + "nibabel.Nifti1Image(np.asarray(warp.get_forward_field())[..., None, :], fixed.affine)"
    + ".to_filename(sys.argv[3] + '/warp.nii.gz')",
}
PARAMETERS = """(FixedInternalImagePixelType "float") (MovingInternalImagePixelType "float")
(Registration "MultiResolutionRegistration") (Interpolator "LinearInterpolator")
(Metric "AdvancedMattesMutualInformation")
(ResampleInterpolator "FinalBSplineInterpolator") (FinalBSplineInterpolationOrder 1)
(Resampler "DefaultResampler") (NumberOfResolutions 3)
(FixedImagePyramid "FixedRecursiveImagePyramid") (MovingImagePyramid "MovingRecursiveImagePyramid")
(Optimizer "AdaptiveStochasticGradientDescent") (MaximumNumberOfIterations 250) (NumberOfSpatialSamples 4000)
(ImageSampler "RandomCoordinate") (NewSamplesEveryIteration "true") (RandomSeed 1) (NumberOfHistogramBins 32)
(AutomaticTransformInitialization "true") (AutomaticTransformInitializationMethod "CenterOfGravity")
(HowToCombineTransforms "Compose") (WriteResultImage "true") (ResultImageFormat "nii.gz") (DefaultPixelValue 0)
"""


def command(program: str, head: Path, template: Path, folder: Path, python: str) -> list[str] | None:
    """Command line of a program; None where it is not installed."""
    if program in CODE:
        package = program.partition("-")[0]
        found = subprocess.run([python, "-c", f"import {package}"], capture_output=True, check=False)
        files = [str(head), str(template), "{run}", str(TEMPLATE_LABELS)]
        return None if found.returncode else [python, "-c", CODE[program], *files]
    if program == "elastix" and shutil.which("elastix"):
        files = []
        for kind in ("AffineTransform", "BSplineTransform"):
            files.append(folder / f"{kind}.txt")
            spline = kind.startswith("B")
            grid = "(FinalGridSpacingInPhysicalUnits 16)" if spline else '(AutomaticScalesEstimation "true")'
            text = f'{PARAMETERS}(Transform "{kind}") {grid}\n'
            files[-1].write_text(text.replace(") (", ")\n("))
        steps = [part for file in files for part in ("-p", str(file))]
        return ["elastix", "-threads", "1", "-f", str(template), "-m", str(head), *steps, "-out", "{run}"]
    if program == "mrtrix" and shutil.which("mrregister"):
        return ["mrregister", "-nthreads", "0", "-quiet", str(head), str(template), "-type", "affine_nonlinear",
                "-nl_warp", "{run}/warp.nii.gz", "{run}/inverse.nii.gz", "-transformed", "{run}/warped.nii.gz",
                "-affine", "{run}/affine.txt"]  # fmt: skip
    return None


def prepare(source: Path, folder: Path) -> Path:
    """The image at 2 mm, as float32."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / source.name
    if not path.exists():
        image = resample_to_output(nib.load(source), VOXEL_MM, order=1)
        nib.Nifti1Image(np.asarray(image.dataobj, np.float32), image.affine).to_filename(path)
    return path


def run(options: argparse.Namespace) -> None:
    """Run every program on every head."""
    os.environ["ANTS_RANDOM_SEED"] = "1"  # its own argument for that has no effect on what ANTs samples
    out = options.out
    template = prepare(options.template, out / "input")
    for program in options.programs:
        for source in options.heads:
            head = prepare(source, out / "heads")
            name = source.name.partition(".")[0]
            asked = command(program, head, template, out / "input", options.python)
            if asked is None:
                print(f"{program}: not installed, left out", flush=True)
                break
            runs = out / program / name
            flags = ["--n", str(options.n), "--nprocs", str(options.nprocs), "--seed", str(options.seed)]
            flags += ["--spare-integers"] if asked[0] == options.python else []
            print(program, name, "exit code", perturb_main([str(runs), *flags, "--", *asked]), flush=True)
            compare_main([str(runs), "-o", str(out / "compared" / program / name)])


def summarise(out: Path) -> None:
    """Print a row per program: means over heads, the smallest Dice of each, and the range of the SD of warps."""
    measures = {
        ("displacement", "sd"): "warp SD, mm", ("displacement", "sd_p95"): "95 %",
        ("displacement", "sd_max"): "largest",
        ("displacement", "sigbits"): "bits of the warp", ("affine", "sd"): "affine RMS, mm",
        ("scalar", "sigbits"): "bits of the image", ("labels", "dice_min"): "smallest Dice",
    }  # fmt: skip
    rows = []
    for program in sorted(path for path in (out / "compared").iterdir() if path.is_dir()):
        heads = sorted(program.glob("*/comparison.tsv"))
        tables = {path.parent.name: pd.read_csv(path, sep="\t", na_values="n/a") for path in heads}
        table = pd.concat(tables, names=["head"]).reset_index()
        records = pd.concat([_records(out / program.name / path.parent.name) for path in heads])
        noisy, plain = records[records["name"] != "ieee"], records[records["name"] == "ieee"].set_index("head")
        slower = noisy.groupby("head")["processor_seconds"].mean() / plain["processor_seconds"]
        row = {"program": program.name, "heads": len(heads), "runs": len(noisy) // len(heads),
               "processor time over plain": slower.mean(), "calls, million": noisy["calls"].mean() / 1e6}  # fmt: skip
        for (kind, column), heading in measures.items():
            of_head = table[table["kind"] == kind].groupby("head")[column]
            found = of_head.min() if column == "dice_min" else of_head.mean()
            row[heading] = found.mean()
            if heading == "warp SD, mm" and len(found):
                row["range over heads"] = f"{found.min():.3g} to {found.max():.3g}"
        rows.append(row)
    print_markdown(pd.DataFrame(rows).set_index("program"))


def compare_families(out: Path, cache: Path) -> None:
    """Print, of each source of spread, Dice between pairs, CV and significant bits, with intervals over heads."""
    heads = {head.head.name: head for head in read_cache(cache)}
    families = {"rounding at inference (`rr`)": ["rr"], "rounding in training (`ieee`, `mca`)": ["ieee", "mca"],
                "seeds (`seed`)": ["seed"]}  # fmt: skip
    rows = []
    for path in sorted((out / "compared").glob("*/*/comparison.tsv")):
        table = pd.read_csv(path, sep="\t", na_values="n/a")
        head = heads.get(path.parent.name.partition("_T1w")[0])
        table = table[table["name"].isin(head.names)] if head else table[:0]
        if table.empty:
            continue
        measured = table[["n", "dice_min", "dice_mean", "cv", "sigbits"]].mean().to_dict()
        rows.append({"source": f"{path.parts[-3]} (libm)", "head": head.head.name} | measured)
        for source, names in families.items():
            chosen = np.flatnonzero(head.passes["family"].isin(names))
            pairs, own = head.intersections[np.ix_(chosen, chosen)], np.arange(len(chosen))
            counts = RegionCounts(pairs[own, own], pairs)
            dice = np.array([pairwise_dice(counts)[a, b, 1:] for a, b in combinations(own, 2)])
            mean, sd = counts.volumes[:, 1:].mean(axis=0), counts.volumes[:, 1:].std(axis=0, ddof=1)
            bits = significant_bits(mean, sd, FLOAT64_BITS).mean()
            rows.append({"source": source, "head": head.head.name, "n": len(chosen), "dice_mean": dice.mean(),
                         "dice_min": dice.min(axis=0).mean(), "cv": (sd / mean).mean(), "sigbits": bits})  # fmt: skip
    found = pd.DataFrame(rows).drop_duplicates(["source", "head"])
    table = pd.DataFrame({"runs": found.groupby("source")["n"].first().astype(int)})
    for column, heading in {"dice_mean": "mean Dice of pairs", "dice_min": "smallest Dice of pairs",
                            "cv": "CV of volumes", "sigbits": "bits of volumes"}.items():  # fmt: skip
        of_source = found.groupby("source")[column]
        half = student_t.ppf(0.975, of_source.size() - 1) * of_source.sem()
        digits = 1 if column == "sigbits" else 4
        table[heading] = [f"{mean:.{digits}f} ± {h:.{digits}f}" for mean, h in zip(of_source.mean(), half, strict=True)]
    print("Means over structures and heads, with 95 % intervals over heads.\n")
    print_markdown(table)


def _records(runs: Path) -> pd.DataFrame:
    """How each run that succeeded ended."""
    found = pd.DataFrame([json.loads(path.read_text()) for path in sorted((runs / "logs").glob("*.json"))])
    return found[found["problem"] == ""].assign(head=runs.name)


def main() -> None:
    """Run or summarise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--heads", type=Path, nargs="+", default=[])
    parser.add_argument("--template", type=Path)
    parser.add_argument("--programs", nargs="+", default=[*CODE, "elastix", "mrtrix"])
    parser.add_argument("--n", type=int, default=10)
    parser.add_argument("--nprocs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--python", default=sys.executable, help="that has antspyx and dipy")
    parser.add_argument("--summarise", action="store_true")
    parser.add_argument("--networks", type=Path, help="folder of segment_heads.py")
    options = parser.parse_args()
    if not options.summarise:
        run(options)
    print(f"{date.today()}, {platform.platform()}\n")
    summarise(options.out)
    if options.networks:
        compare_families(options.out, options.networks)


if __name__ == "__main__":
    main()
