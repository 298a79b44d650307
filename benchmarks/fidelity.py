"""How well the engine's rounding errors match those of single rounded instructions.

    python benchmarks/fidelity.py [--mode rr] [--precision 24] [--accumulation fast none] [--centre exact]
        [--images PATH] [--repeats 16] [--quick] [--output fidelity.tsv]

Runs torch operators, forward and backward, under `MonteCarloArithmetic` with one seed per repeat,
and the same operators under `tests/numerics/reference.py`, which rounds after each multiplication
and each addition; then a small U-Net from end to end. Prints Markdown tables and writes a TSV with
more columns. One thread.

For each result of each operator:

ratio
    Spread of the engine over that of the reference: the root of the mean over elements of the
    variance over repeats. After the sign +-, its standard error: jackknife over elements or, where
    elements share rounding errors (those of one normalised channel), over sets of them that do
    not.
bias
    Mean over elements of the engine's mean error (against float64) in units of its standard error
    over the same sets. Beyond +-2 in 5 % of the cases without any bias.

elements
    5th, 50th and 95th percentile over elements of their own ratios (16 repeats on each side spread
    these from 0.64 to 1.55 alone), and the root mean square over elements of their mean error in
    standard deviations (0.25 by chance).

In the TSV also the bias in units of the reference's spread.

What the reference returned is kept in --cache, so that the next run with the same options takes a
fraction of the time. The T1w given with --images is a file or a folder; without, it is the MNI152
template of nilearn (no network needed).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import os
import platform
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
import scipy
import torch

from bids_varaug.numerics import MonteCarloArithmetic

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the reference lies with the tests
import fidelity_cases
from fidelity_cases import Case, Images, all_cases, reference_network, small_network

from tests.numerics import reference, reference_instructions
from tests.numerics.reference import Arithmetic

KEPT = 4096  # elements of a result whose spread is looked at, at most
NETWORK_TOLERANCE = {"fast": 0.5}  # bits


@dataclass(frozen=True)
class Settings:
    """Arithmetic and amount of data of a run.

    Attributes
    ----------
    mode, precision, lanes, fma : as of the engine and of the reference
    dtype : "float32" or "float64"
    repeats, network_repeats : how many seeds on either side
    network_side : voxels of the network's image along each axis
    cache : folder for what the reference returned
    centre : of the engine
    """

    mode: str
    precision: int
    lanes: int
    fma: bool
    dtype: str
    repeats: int
    network_repeats: int
    network_side: int
    cache: Path
    centre: str = "torch"

    def engine(self, name: str, repeat: int, accumulation: str) -> MonteCarloArithmetic:
        """Context manager of one repeat of a case, with a seed of its own."""
        seed = zlib.crc32(f"{name} {self.mode} {self.precision} {repeat}".encode())
        return MonteCarloArithmetic(
            self.mode,
            self.precision,
            seed,
            accumulation=accumulation,
            lanes=self.lanes,
            fma=self.fma,
            centre=self.centre,
        )

    def reference(self, name: str, repeat: int) -> Arithmetic:
        """Arithmetic of one repeat of a case: its own stream of random numbers."""
        mode = "cestac" if self.mode == "random" else self.mode
        arithmetic = Arithmetic(mode, 0, self.precision, self.lanes, self.fma)
        return arithmetic.at(zlib.crc32(name.encode()), repeat)


# --------------------------------------------------------------------------------------------------
# Statistics


def spread_ratio(engine: np.ndarray, by_reference: np.ndarray) -> tuple[float, float]:
    """Pooled ratio of standard deviations and its standard error.

    Parameters
    ----------
    engine, by_reference : (R, U, n), results of R repeats in U parts that share no errors

    Returns
    -------
    ratio : NaN where the reference does not vary
    standard_error : by jackknife over the parts

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> draws = rng.normal(size=(2, 32, 100, 1))
    >>> ratio, error = spread_ratio(3 * draws[0], draws[1])
    >>> round(ratio, 1), bool(0.02 < error < 0.08)
    (3.0, True)
    """
    parts = np.stack([samples.var(0, ddof=1).mean(1) for samples in (engine, by_reference)])
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.sqrt(np.divide(*parts.sum(1)))
        left_out = np.sqrt(np.divide(*(parts.sum(1, keepdims=True) - parts)))
    n = parts.shape[1]
    return float(ratio), float(np.sqrt((n - 1) * np.mean((left_out - left_out.mean()) ** 2)))


def ratio_percentiles(engine: np.ndarray, by_reference: np.ndarray) -> np.ndarray:
    """5th, 50th and 95th percentile over the elements of their own ratios; arrays as above."""
    spread, expected = engine.std(0, ddof=1), by_reference.std(0, ddof=1)
    varies = expected > 0
    if not varies.any():
        return np.full(3, np.nan)
    return np.percentile(spread[varies] / expected[varies], (5, 50, 95))


def bias(samples: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """Mean error, absolute and in units of its standard error.

    Parameters
    ----------
    samples : (R, U, n)
    exact : (U, n)
    """
    errors = (samples.mean(0, dtype="float64") - exact).mean(1)
    standard_error = errors.std(ddof=1) / np.sqrt(errors.size)
    mean = errors.mean()
    return float(mean), float(mean / standard_error) if standard_error > 0 else 0.0


def significant_bits(samples: np.ndarray) -> np.ndarray:
    """5th, 50th and 95th percentile over elements of ``-log2(sd / |mean|)``; (R, ...)."""
    with np.errstate(divide="ignore"):
        bits = -np.log2(samples.std(0, ddof=1) / np.abs(samples.mean(0)))
    return np.percentile(bits, (5, 50, 95))


# --------------------------------------------------------------------------------------------------
# Runs


def selected(result: np.ndarray, n_units: int | None) -> np.ndarray:
    """(U, n): a result in parts with errors of their own, thinned out where it is large."""
    rows = result.reshape(result.size if n_units is None else n_units, -1)
    step = max(1, -(-result.size // KEPT))
    return rows[::step] if n_units is None else rows[:, ::step]


def torch_results(case: Case, arrays: dict) -> dict[str, np.ndarray]:
    """Run a case with torch, as it is or inside the engine."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if case.channels_last:
        tensors = {name: _channels_last(tensor) for name, tensor in tensors.items()}
    results = case.by_torch(tensors)
    return {
        name: selected(value.detach().numpy(), case.units.get(name))
        for name, value in results.items()
    }


def _channels_last(tensor):
    layout = torch.channels_last_3d if tensor.dim() == 5 else torch.contiguous_format
    return tensor.contiguous(memory_format=layout)


def repeated(run, n: int) -> dict[str, np.ndarray]:
    """Stack the results of `run` (repeat) over n repeats."""
    results = [run(repeat) for repeat in range(n)]
    return {name: np.stack([result[name] for result in results]) for name in results[0]}


def from_engine(case: Case, arrays: dict, settings: Settings, accumulation: str):
    """Results (R, U, n) of a case under the engine, by name."""

    def run(repeat):
        with settings.engine(case.label, repeat, accumulation):
            return torch_results(case, arrays)

    return repeated(run, settings.repeats)


def from_reference(case: Case, arrays: dict, settings: Settings):
    """Results (R, U, n) of a case under the reference, by name."""

    def run(repeat):
        results = case.by_reference(arrays, settings.reference(case.label, repeat))
        return {name: selected(value, case.units.get(name)) for name, value in results.items()}

    return cached(case.label, arrays, settings, run, settings.repeats)


def cached(label: str, arrays: dict, settings: Settings, run, n: int) -> dict[str, np.ndarray]:
    """What `repeated` returns, from the cache if data, settings and code are the same."""
    digest = hashlib.sha256()
    for module in (reference, reference_instructions, fidelity_cases):
        digest.update(Path(module.__file__).read_bytes())
    for key, array in sorted(arrays.items()):
        digest.update(f"{key} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(f"{settings.reference(label, 0)} {n} {KEPT}".encode())
    file = settings.cache / f"{digest.hexdigest()[:32]}.npz"
    if file.exists():
        with np.load(file) as stored:
            return dict(stored)
    results = repeated(run, n)
    settings.cache.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.npz")
    np.savez(unfinished, **results)
    unfinished.replace(file)
    return results


def case_rows(case: Case, settings: Settings, accumulations: list[str]) -> list[dict]:
    """Compare engine and reference: one row per result and accumulation."""
    arrays = converted(case.arrays(), settings.dtype)
    exact = torch_results(case, converted(arrays, "float64"))
    expected = from_reference(case, arrays, settings)
    rows = []
    for accumulation in accumulations:
        results = from_engine(case, arrays, settings, accumulation)
        rows += [
            {
                "operator": case.operator,
                "size": case.size,
                "kind": case.kind,
                "result": name,
                "accumulation": accumulation,
            }
            | compared(results[name], expected[name], exact[name])
            for name in exact
        ]
    return rows


def converted(arrays: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Numbers of another format; integers stay what they are."""
    return {
        name: np.ascontiguousarray(array, dtype if array.dtype.kind == "f" else array.dtype)
        for name, array in arrays.items()
    }


def compared(engine: np.ndarray, by_reference: np.ndarray, exact: np.ndarray) -> dict:
    """Columns of one row; (R, U, n), (R, U, n), (U, n)."""
    engine, by_reference = engine.astype("float64"), by_reference.astype("float64")
    ratio, error = spread_ratio(engine, by_reference)
    low, middle, high = ratio_percentiles(engine, by_reference)
    spread = np.sqrt(by_reference.var(0, ddof=1).mean())
    mean_error, in_errors = bias(engine, exact)
    with np.errstate(invalid="ignore", divide="ignore"):
        of_elements = (engine.mean(0) - exact) / by_reference.std(0, ddof=1)
    of_elements = of_elements[np.isfinite(of_elements)]
    return {
        "ratio": ratio,
        "ratio_se": error,
        "ratio_p5": low,
        "ratio_p50": middle,
        "ratio_p95": high,
        "bias_in_se": in_errors,
        "bias_within_2_se": abs(in_errors) <= 2,
        "bias_in_sd": mean_error / spread if spread > 0 else np.nan,
        "bias_of_elements_in_sd": np.sqrt(np.mean(of_elements**2)) if of_elements.size else np.nan,
        "reference_bias_in_se": bias(by_reference, exact)[1],
        "reference_sd": spread,
        "elements": exact.size,
    }


def network_rows(images: Images, settings: Settings, accumulations: list[str]) -> list[dict]:
    """Significant bits of the logits of a small U-Net: one row per way to infer and accumulation.

    With the batch's statistics, as in training, and with statistics by slabs, as in inference.
    """
    network, image = small_network(images, settings.network_side)
    network, image = (item.to(getattr(torch, settings.dtype)) for item in (network, image))
    arrays = {name: value.numpy() for name, value in network.state_dict().items()}
    arrays["image"] = image.numpy()
    rows = []
    for kind, by_slabs in (("as in training", False), ("as in inference", True)):
        network.train(not by_slabs)
        difference = check_network(network, image, by_slabs)

        def run_reference(repeat, kind=kind, by_slabs=by_slabs):
            arithmetic = settings.reference(f"network {kind}", repeat)
            return {"logits": reference_network(network, image.numpy(), arithmetic, by_slabs)}

        n = settings.network_repeats
        samples = cached(f"network {kind}", arrays, settings, run_reference, n)
        expected = significant_bits(samples["logits"].astype("float64"))
        for accumulation in accumulations:
            bits = network_bits(network, image, kind, settings, accumulation)
            names = {
                "operator": "network",
                "size": "x".join(map(str, image.shape[2:])),
                "kind": kind,
                "result": "logits",
                "accumulation": accumulation,
                "elements": samples["logits"][0].size,
                "ieee_difference": difference,
            }
            rows.append(names | compared_bits(bits, expected, accumulation))
    return rows


def compared_bits(bits: np.ndarray, expected: np.ndarray, accumulation: str) -> dict:
    """Columns of one row, from percentiles of significant bits."""
    columns = {}
    for prefix, values in (("", bits), ("reference_", expected)):
        columns |= {f"{prefix}bits_p{p}": v for p, v in zip((5, 50, 95), values, strict=True)}
    within = "n/a"
    if accumulation in NETWORK_TOLERANCE:
        within = bool(np.abs(bits - expected).max() <= NETWORK_TOLERANCE[accumulation])
    return columns | {"bits_within_tolerance": within}


def network_bits(network, image, kind: str, settings: Settings, accumulation: str) -> np.ndarray:
    """Percentiles of the significant bits of the logits under the engine."""
    logits = []
    for repeat in range(settings.network_repeats):
        with torch.no_grad(), settings.engine(f"network {kind}", repeat, accumulation):
            logits.append(network(image).double().numpy())
    return significant_bits(np.stack(logits))


def check_network(network, image: torch.Tensor, by_slabs: bool) -> float:
    """Largest difference of torch and of the reference without randomness, in logit units.

    Raises
    ------
    RuntimeError
        If it is more than rounding errors can explain.
    """
    with torch.no_grad():
        by_torch = network(image).numpy()
    by_reference = reference_network(network, image.numpy(), Arithmetic("ieee"), by_slabs)
    difference = float(np.abs(by_torch - by_reference).max())
    if not difference < 2**-9 * np.finfo(by_torch.dtype).eps / np.finfo("float32").eps:
        raise RuntimeError(
            f"Logits of torch and of the reference differ by {difference:.2g}: not the same network"
        )
    return difference


# --------------------------------------------------------------------------------------------------
# Output


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary_table(rows: list[dict], accumulations: list[str]) -> str:
    """One line per result of an operator.

    Medians over cases; the range of the pooled ratio.
    """
    header = ["operator", "cases"]
    for accumulation in accumulations:
        header += [f"{accumulation}: ratio (range)", "5, 50, 95 % of elements", "bias of elements"]
    lines = []
    for operator, result in dict.fromkeys((row["operator"], row["result"]) for row in rows):
        line = []
        for accumulation in accumulations:
            chosen = [
                row
                for row in rows
                if (row["operator"], row["result"], row["accumulation"])
                == (operator, result, accumulation)
            ]
            ratios = [row["ratio"] for row in chosen if np.isfinite(row["ratio"])] or [np.nan]
            percentiles = [[row[f"ratio_p{p}"] for row in chosen] for p in (5, 50, 95)]
            line += [
                f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                ", ".join(f"{value:.2f}" for value in np.nanmedian(percentiles, axis=1)),
                f"{np.nanmedian([row['bias_of_elements_in_sd'] for row in chosen]):.2f}",
            ]
        lines.append([f"{operator}, {result}", str(len(chosen)), *line])
    return markdown(header, lines)


def full_table(rows: list[dict], accumulations: list[str]) -> str:
    """One line per case and result."""
    header = ["operator", "size", "data", "result"]
    header += [title for name in accumulations for title in (f"{name}: ratio", "bias")]
    lines: dict[tuple, list[str]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("operator", "size", "kind", "result"))
        lines.setdefault(key, list(key)).extend(
            [f"{row['ratio']:.2f} +- {row['ratio_se']:.2f}", f"{row['bias_in_se']:+.1f}"]
        )
    return markdown(header, list(lines.values()))


def network_table(rows: list[dict]) -> str:
    """Percentiles of significant bits, of the engine and of the reference."""
    header = ["network", "accumulation", "5 %", "median", "95 %", "reference", "within tolerance"]
    lines = []
    for row in rows:
        bits = [f"{row[f'bits_p{p}']:.2f}" for p in (5, 50, 95)]
        expected = ", ".join(f"{row[f'reference_bits_p{p}']:.2f}" for p in (5, 50, 95))
        within = {True: "yes", False: "no"}.get(row["bits_within_tolerance"], "n/a")
        lines.append([row["kind"], row["accumulation"], *bits, expected, within])
    return markdown(header, lines)


def circumstances(settings: Settings, images: Images, seconds: float) -> str:
    """Machine, date, versions and options, on one line."""
    return (
        f"{_processor()}, {platform.system()}, {datetime.date.today()}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
        f"numba {numba.__version__}, scipy {scipy.__version__}; "
        f"mode {settings.mode}, precision {settings.precision}, {settings.dtype}, "
        f"lanes {settings.lanes}, fma {settings.fma}, {settings.repeats} repeats "
        f"(network: {settings.network_repeats}), image: {images.name}; {seconds:.0f} s"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_tsv(path: Path, rows: list[dict], settings: Settings) -> None:
    """All rows; n/a where a column does not apply."""
    options = {
        name: getattr(settings, name) for name in ("mode", "precision", "dtype", "lanes", "fma")
    }
    columns = dict.fromkeys(key for row in rows for key in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, [*options, *columns], restval="n/a", delimiter="\t", lineterminator="\n"
        )
        writer.writeheader()
        for row in rows:
            writer.writerow(options | {key: _cell(value) for key, value in row.items()})


def _cell(value):
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if isinstance(value, float | np.floating):
        return f"{value:.4g}" if np.isfinite(value) else "n/a"
    return value


# --------------------------------------------------------------------------------------------------


def default_cache() -> Path:
    """In the user's own cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "bids_varaug" / "fidelity"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", default="rr", choices=["rr", "pb", "mca", "sr", "ud", "random"])
    parser.add_argument("--precision", type=int, default=24, help="virtual, in bits")
    parser.add_argument(
        "--accumulation",
        nargs="+",
        default=["fast", "none"],
        choices=["fast", "none"],
    )
    parser.add_argument("--centre", default="torch", choices=["torch", "exact"], help="of the engine's samples")
    parser.add_argument("--lanes", type=int, default=1, help="interleaved partial sums")
    parser.add_argument("--fma", action="store_true", help="multiply-add is one instruction")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--repeats", type=int, help="seeds of each case (16; quick: 8)")
    parser.add_argument("--network-repeats", type=int, help="seeds of the network (16; quick: 8)")
    parser.add_argument("--only", nargs="+", help="operators that start like this, or network")
    parser.add_argument("--images", type=Path, help="a T1w image or a folder of some")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="%(default)s")
    parser.add_argument("--output", type=Path, help="TSV file to write")
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats")
    return parser.parse_args(arguments)


def wanted(name: str, only: list[str] | None) -> bool:
    """Whether an operator was asked for."""
    return only is None or name.startswith(tuple(only))


def main() -> None:
    """Compare, print, write."""
    options = parse()
    start = time.perf_counter()
    torch.set_num_threads(1)
    settings = Settings(
        options.mode,
        options.precision,
        options.lanes,
        options.fma,
        options.dtype,
        options.repeats or (8 if options.quick else 16),
        options.network_repeats or (8 if options.quick else 16),
        16 if options.quick else 24,
        options.cache,
        options.centre,
    )
    images = Images(options.images)
    rows, of_network = [], []
    for case in all_cases(images):
        if wanted(case.operator, options.only) and (case.quick or not options.quick):
            if sys.stderr.isatty():
                print(f"\r\033[K{case.label}", end="", file=sys.stderr, flush=True)
            rows += case_rows(case, settings, options.accumulation)
    if wanted("network", options.only):
        of_network = network_rows(images, settings, options.accumulation)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    print(circumstances(settings, images, time.perf_counter() - start))
    if rows:
        print("", summary_table(rows, options.accumulation), sep="\n")
    if of_network:
        print("\nSignificant bits of the logits:\n", network_table(of_network), sep="\n")
    if rows:
        print("", full_table(rows, options.accumulation), sep="\n")
    if options.output:
        write_tsv(options.output, rows + of_network, settings)


if __name__ == "__main__":
    main()
