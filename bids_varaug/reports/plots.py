"""Charts of the reports: tables in, SVG or PNG out, the same bytes every time."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from importlib.resources import files

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from PIL import Image

from bids_varaug.models.ensemble import BASELINE
from bids_varaug.reports.html import p_text, signed
from bids_varaug.reports.mosaics import to_png

# Okabe & Ito's palette, told apart with any kind of colour vision; each also has its own marker.
BLACK, ORANGE, GREEN, BLUE, VERMILLION, PURPLE = "#000000", "#e69f00", "#009e73", "#0072b2", "#d55e00", "#cc79a7"
GREY = "#777777"
FAMILY_COLORS = {"mca": BLUE, "seed": VERMILLION, "rr": GREEN}
LOOKS = {  # colour, marker and line of each augmentation and baseline
    "none": (BLACK, "o", "-"),
    "mean": (BLUE, "s", "-"),
    "members": (VERMILLION, "D", "-"),
    "analytic": (GREEN, "^", "-"),
    "jitter": (PURPLE, "v", ":"),
    "shuffled": (ORANGE, "P", ":"),
    "ridge": (BLACK, "X", ":"),
}
PIPELINE_LOOKS = ((VERMILLION, "D"), (GREEN, "^"), (PURPLE, "s"))
BAND = "#f5f6f8"
MAX_ROWS = 80  # structures shown, the first ones of a table
RASTER_FROM = 1500  # points; more of them are drawn as an image inside the SVG
SHOWN_INTERVALS = 150
FONT = 10
INK = "#1b1f24"
SOFT = "#57606a"
STYLE = str(files("bids_varaug") / "data" / "templates" / "charts.mplstyle")
# "default" first, so that a user's matplotlibrc does not change the bytes.
_styled = matplotlib.style.context(["default", STYLE])


@_styled
def draw_ages(predictions: pd.DataFrame) -> str:
    """SVG of predicted against true age, with prediction intervals and numerical spread.

    Of more than `SHOWN_INTERVALS` rows of `Evaluation.predictions`, the intervals of that many, evenly over age, are
    drawn.
    """
    table = predictions.sort_values("age", kind="stable")
    figure = Figure(figsize=(7.6, 6.4))
    axes = figure.add_axes((0.1, 0.1, 0.88, 0.8))
    ages = table["age"].astype(float)
    limits = table[["age", "predicted", "lower", "upper"]].to_numpy(float)
    limits = limits[np.isfinite(limits)]
    low, high = limits.min(), limits.max()
    axes.plot([low, high], [low, high], color=GREY, linewidth=1, dashes=(4, 3), zorder=1, label="predicted = true")
    chosen = np.unique(np.linspace(0, len(table) - 1, SHOWN_INTERVALS).round().astype(int))
    _draw_people(axes, table["age"], table, chosen if len(table) > SHOWN_INTERVALS else slice(None))
    axes.set(xlim=_padded(ages.min(), ages.max()), ylim=_padded(low, high))
    axes.set(xlabel="true age [years]", ylabel="predicted age, out of sample [years]")
    figure.legend(bbox_to_anchor=(0.09, 1.0), ncols=2, fontsize=FONT - 0.5)
    return _svg(figure)


@_styled
def draw_ranked(predictions: pd.DataFrame) -> str:
    """SVG of predicted ages in ascending order, with intervals and numerical spread; no age is needed."""
    table = predictions.sort_values("predicted", kind="stable")
    figure = Figure(figsize=(7.6, 4.8))
    axes = figure.add_axes((0.1, 0.13, 0.88, 0.76))
    _draw_people(axes, pd.Series(np.arange(1, len(table) + 1)), table)
    axes.set(xlabel="image, in the order of predicted age", ylabel="predicted age [years]")
    figure.legend(bbox_to_anchor=(0.09, 1.0), ncols=3, fontsize=FONT - 0.5)
    return _svg(figure)


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.03 * (high - low) + 0.5
    return low - margin, high + margin


def _draw_people(axes: Axes, x: pd.Series, table: pd.DataFrame, shown: np.ndarray | slice = slice(None)) -> None:
    """A dot per image; prediction interval and numerical spread of the rows `shown`."""
    at, part = x.iloc[shown], table.iloc[shown]
    some = f" of {len(part)} of {len(table)}" if len(part) < len(table) else ""
    if part["lower"].notna().any():
        label = f"prediction interval{some}"
        axes.vlines(at, part["lower"], part["upper"], color="#9ecae1", linewidth=1.2, zorder=1.5, label=label)
    many = len(table) > RASTER_FROM
    axes.plot(
        x, table["predicted"], "o", color=BLUE, alpha=0.75, markeredgewidth=0, zorder=3, rasterized=many, label="image",
        markersize=5.5 if len(table) <= 200 else 2.0 if many else 3.5,
    )  # fmt: skip
    if part["sd_num"].notna().any():
        ends = part["predicted"] - part["sd_num"], part["predicted"] + part["sd_num"]
        label = f"± numerical standard deviation{some}"
        axes.vlines(at, *ends, color=VERMILLION, linewidth=1.8, zorder=4, label=label)


@_styled
def draw_gains(gains: pd.DataFrame) -> str:
    """SVG of the paired gain of each comparison (`Evaluation.gains`) with its confidence interval."""
    rows = gains.set_index("augmentation")
    height = 1.2 + 0.46 * len(rows)
    figure = Figure(figsize=(8.2, height))
    axes = figure.add_axes((0.31, 0.6 / height, 0.37, 1 - 1.0 / height))
    for y, (name, row) in enumerate(rows.iterrows()):
        color, marker, _ = LOOKS[str(name)]
        axes.plot([row["low"], row["high"]], [y, y], color=color, linewidth=2.4)
        axes.plot(row["gain"], y, marker, color=color, markersize=8)
        gain, low, high = (signed(row[column]) for column in ("gain", "low", "high"))
        text = f"{gain}  [{low}, {high}]   p {p_text(row['p_value'])}"
        axes.text(1.03, y, text, transform=axes.get_yaxis_transform(), fontsize=FONT - 0.5, va="center")
    axes.axvline(0, color=INK, linewidth=1)
    _set_rows(axes, [f"{name} over {row['against']}" for name, row in rows.iterrows()], (len(rows) - 0.5, -0.5))
    reach = np.nanmax(np.abs(rows[["low", "high", "gain"]].to_numpy(float)))
    reach = 1.1 * reach if reach > 0 else 1.0
    axes.set(xlim=(-reach, reach), xlabel="gain in mean absolute error [years]")
    axes.text(0.0, 1.02, "← worse", transform=axes.transAxes, color=SOFT)
    axes.text(1.0, 1.02, "better →", transform=axes.transAxes, color=SOFT, ha="right")
    return _svg(figure)


@_styled
def draw_learning_curve(curve: pd.DataFrame) -> str:
    """SVG of the mean absolute error against the number of training participants (`Evaluation.learning_curve`)."""
    figure = Figure(figsize=(8.2, 4.6))
    axes = figure.add_axes((0.09, 0.12, 0.68, 0.84))
    names = list(dict.fromkeys(curve["augmentation"]))
    for number, name in enumerate(names):
        rows = curve[curve["augmentation"] == name].sort_values("n_participants")
        # A little apart, so that equal intervals do not hide each other.
        x = rows["n_participants"] * 1.018 ** (number - (len(names) - 1) / 2)
        color, marker, line = LOOKS[name]
        axes.vlines(x, rows["low"], rows["high"], color=color, linewidth=1.2, alpha=0.6)
        axes.plot(x, rows["mae"], line, marker=marker, color=color, markersize=5.5, linewidth=1.5, label=name)
    ticks = sorted(set(curve["n_participants"]))
    axes.set_xscale("log")
    _set_ticks(axes, ticks, [f"{t:,.0f}" for t in ticks])
    axes.set(xlabel="training participants (logarithmic)", ylabel="mean absolute error [years]")
    figure.legend(bbox_to_anchor=(0.78, 0.97))
    return _svg(figure)


@_styled
def draw_ratios(numerics: pd.DataFrame, others: Sequence[tuple[str, pd.DataFrame]] = ()) -> str:
    """SVG of the numerical over the anatomical standard deviation of each structure, with 95 % intervals.

    Tables of `variability.numerical_variability`: ours, and with their names those of other pipelines.
    """
    order = pair_sides(numerics["name"])[:MAX_ROWS]
    figure, axes = _structure_axes(len(order))
    series = [("this ensemble", numerics, BLUE, "o")]
    series += [(name, other, *PIPELINE_LOOKS[n % len(PIPELINE_LOOKS)]) for n, (name, other) in enumerate(others)]
    found = []
    for number, (label, data, color, marker) in enumerate(series):
        rows = data.set_index("name").reindex(order)[["ratio", "low", "high"]]
        values = rows.replace([np.inf, 0], np.nan).to_numpy(float)
        y = np.arange(len(order)) + 0.2 * (number - (len(series) - 1) / 2)
        axes.hlines(y, values[:, 1], values[:, 2], color=color, linewidth=1.6, alpha=0.7)
        axes.plot(values[:, 0], y, marker, color=color, markersize=5, label=label, linestyle="none")
        found.append(values[np.isfinite(values)])
    shown = np.concatenate(found)
    axes.set_xscale("log")
    if shown.size:
        axes.set_xlim(0.9 * shown.min(), 1.1 * max(shown.max(), 1.0))
    low, high = axes.get_xlim()
    ticks = [m * 10.0**e for e in range(-3, 2) for m in (1, 2, 5) if low <= m * 10.0**e <= min(high, 10)]
    _set_ticks(axes, ticks, [f"{t:g}" for t in ticks])
    axes.axvline(1, color=GREY, linewidth=1, dashes=(4, 3))
    _name_rows(axes, order, FONT - 1)
    axes.set_xlabel("numerical / anatomical standard deviation (logarithmic; 1: equal)")
    if others:
        figure.legend(bbox_to_anchor=(0.26, 1.0), ncols=len(series))
    return _svg(figure)


@_styled
def draw_ranges(volumes: pd.DataFrame, structures: pd.DataFrame, outlying: np.ndarray) -> str:
    """SVG of every image's volumes [mm3], a row per structure, beside the range of plausible ones.

    `structures` has name, low and high, missing where there is no range; (R,) bool `outlying` images are red.
    """
    order = pair_sides(structures["name"])[:MAX_ROWS]
    figure, axes = _structure_axes(len(order))
    limits = structures.set_index("name").loc[order]
    rows = np.arange(len(order))
    axes.barh(rows, limits["high"] - limits["low"], 0.62, limits["low"], color="#cfe3f1", label="plausible in adults")
    top = np.argsort(outlying, kind="stable")  # what stands out is drawn last
    shift, many = np.linspace(-0.22, 0.22, len(volumes))[top], len(volumes) * len(order) > RASTER_FROM
    sizes, colors = np.where(outlying, 24, 5 if many else 12)[top], np.where(outlying, VERMILLION, BLUE)[top]
    for row, name in enumerate(order):
        x = volumes[name].to_numpy()[top]
        axes.scatter(x, row + shift, sizes, colors, alpha=0.7, linewidths=0, rasterized=many)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [10.0**e for e in range(-3, 8) if low <= 10.0**e <= high]
    _set_ticks(axes, ticks, [f"{t:,g}" for t in ticks])
    _name_rows(axes, order, FONT - 1)
    axes.set_xlabel("volume [mm³], logarithmic")
    figure.legend(bbox_to_anchor=(0.26, 1.0))
    return _svg(figure)


@matplotlib.style.context(["default", STYLE, {"axes.edgecolor": BLACK}])
def draw_volumes(members: pd.DataFrame, narrow: bool = False) -> bytes:
    """PNG of the volumes of every structure, one dot per member, relative to the mean of the members.

    The mean is over the perturbed members. The axis is linear within 1 % and logarithmic beyond, so that structures of
    0.3 % and of 30 % spread both show it. With a single member volumes are drawn in mm3 on a logarithmic axis. Columns
    of `members`: member, family, index, name, volume [mm3]. `narrow` is for screens of 400 px.
    """
    order = pair_sides(members.loc[members["index"] != 0, "name"].drop_duplicates())[:MAX_ROWS]
    relative = members["member"].nunique() > 1
    figure = Figure(figsize=(4.3 if narrow else 10.5, 1.15 + 0.235 * len(order)), dpi=180 if narrow else 130)
    canvas = FigureCanvasAgg(figure)
    height = figure.get_figheight()
    axes = figure.add_axes((0.45 if narrow else 0.22, 0.62 / height, 0.37 if narrow else 0.6, 1 - 1.1 / height))
    perturbed = members[members["family"] != BASELINE]
    spread = (members if perturbed.empty else perturbed).groupby("name")["volume"].agg(["mean", "std"])
    for row, (mean, std) in enumerate(spread.loc[order].itertuples(index=False)):
        share = f"± {100 * std / mean:.1f} %" if relative and mean > 0 and not np.isnan(std) else ""
        text = share if narrow and relative else f"{mean:,.0f} mm³   {share}".rstrip()
        axes.text(1.02, row, text, transform=axes.get_yaxis_transform(), fontsize=FONT - 1, va="center")
    # Absent in all perturbed members: nothing to be relative to.
    means = members["name"].map(spread["mean"].where(spread["mean"] > 0))
    x = 100 * (members["volume"] / means - 1) if relative else members["volume"]
    y = members["name"].map({name: row for row, name in enumerate(order)})
    families = sorted(set(perturbed["family"]))
    handles = []
    for number, family in enumerate(families):
        # Families a little apart, so that equal volumes do not hide each other.
        shift = 0.16 * (2 * number - (len(families) - 1)) / max(1, len(families) - 1)
        mine, color = members["family"] == family, FAMILY_COLORS.get(family, PURPLE)
        axes.plot(x[mine], y[mine] + shift, "o", markersize=4.2, alpha=0.8, color=color, markeredgewidth=0)
        handles += axes.plot([], [], "o", color=color, label=f"{family} members")
    mine = members["family"] == BASELINE
    if mine.any():
        axes.plot(x[mine], y[mine], "D", markersize=4.6, mfc="none", mec=BLACK, zorder=4)
        handles += axes.plot([], [], "D", label="ieee (unperturbed)", mfc="none", mec=BLACK)
    _name_rows(axes, order, FONT - 0.5)
    axes.tick_params(axis="x", labelsize=FONT - 1)
    if relative:
        reach = max(1.0, *x[y.notna()].abs().dropna()) * 1.15
        shown = (1, 10, 100, 1000) if narrow else (0.5, 1, 2, 5, 10, 20, 50, 100, 300, 1000)
        half = [t for t in shown if t <= reach]
        ticks = [*(-t for t in reversed(half)), 0, *half]
        axes.set_xscale("symlog", linthresh=1.0, linscale=1.0)
        axes.set_xlim(-reach, reach)
        _set_ticks(axes, ticks, [f"{t:+g}".replace("-", "−") if t else "0" for t in ticks])
        axes.axvline(0, color=GREY, linewidth=0.8, zorder=1)
    else:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda volume, _: f"{volume:,.0f}")
        axes.minorticks_off()
    scale = "linear to ±1 %, then logarithmic"
    difference = f"difference from the mean of the members [%]{chr(10) if narrow else '  '}({scale})"
    # Names and axis share the width of a narrow figure.
    axes.set_xlabel(difference if relative else "volume [mm³]", fontsize=FONT - 1, x=0.2 if narrow else 0.5)
    figure.legend(
        handles=handles, bbox_to_anchor=(0.0 if narrow else 0.21, 1.0), fontsize=FONT - (1.5 if narrow else 0),
        ncols=len(handles), columnspacing=1.0, handletextpad=0.2,
    )  # fmt: skip
    if not narrow:
        heading = "mean   ± SD" if relative else "volume"
        figure.text(0.826, 1 - 0.21 / height, heading, fontsize=FONT - 1, va="center")
    canvas.draw()
    return to_png(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))


def short_name(name: str) -> str:
    """FreeSurfer name with its side behind: "Left-Inf-Lat-Vent" becomes "Inf Lat Vent  L"."""
    side, _, rest = name.partition("-")
    marked = f"{rest}  {side[0]}" if side in ("Left", "Right") else name
    return marked.replace("-", " ")


def pair_sides(names: Sequence[str] | pd.Series) -> list[str]:
    """Names in their order, but each right structure just after its left one."""
    pairs: dict[str, list[str]] = {}
    for name in names:
        pairs.setdefault(str(name).removeprefix("Left-").removeprefix("Right-"), []).append(name)
    return [name for pair in pairs.values() for name in pair]


def _structure_axes(n_rows: int) -> tuple[Figure, Axes]:
    height = 1.4 + 0.25 * n_rows
    figure = Figure(figsize=(8.8, height))
    return figure, figure.add_axes((0.27, 0.65 / height, 0.7, 1 - 1.15 / height))


def _set_ticks(axes: Axes, ticks: Sequence[float], labels: Sequence[str]) -> None:
    axes.set_xticks(ticks, labels)
    axes.set_xticks([], minor=True)


def _name_rows(axes: Axes, names: Sequence[str], size: float) -> None:
    """A row for each structure, every other one shaded."""
    for row in range(1, len(names), 2):
        axes.axhspan(row - 0.5, row + 0.5, color=BAND, zorder=0)
    _set_rows(axes, [short_name(str(name)) for name in names], (len(names) - 0.4, -0.6), size)


def _set_rows(axes: Axes, labels: Sequence[str], ends: tuple[float, float], size: float = FONT) -> None:
    """Label rows at the left, without an axis."""
    axes.set_yticks(range(len(labels)), labels, fontsize=size)
    axes.set_ylim(*ends)
    axes.spines["left"].set_visible(False)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Creator": None})
    # The document type names a file on the network; browsers do not need it.
    return re.sub(r"^.*?(?=<svg)", "", stream.getvalue(), count=1, flags=re.S)
