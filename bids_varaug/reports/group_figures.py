"""Figures of the group report: tables in, SVG text out, the same text every time."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import matplotlib
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from bids_varaug.brainage.outputs import CONTROLS
from bids_varaug.reports.volume_plot import pair_sides, short_name

# Okabe & Ito's palette, told apart with any kind of colour vision; each also has its own marker.
COLORS = {
    "none": "#000000",
    "mean": "#0072b2",
    "members": "#d55e00",
    "analytic": "#009e73",
    "jitter": "#cc79a7",
    "shuffled": "#e69f00",
    "mean_predictor": "#777777",
    "ridge": "#56b4e9",
}
MARKERS = {"none": "o", "mean": "s", "members": "D", "analytic": "^", "jitter": "v",
           "shuffled": "P", "mean_predictor": "x", "ridge": "*"}  # fmt: skip
LINES = {"mean_predictor": ":", "ridge": "--", "jitter": ":", "shuffled": ":"}
OTHER_COLOR = "#56b4e9"
RASTER_FROM = 1500  # points; more of them are drawn as an image inside the SVG
SHOWN_INTERVALS = 150
FONT = 10
INK = "#1b1f24"
GRID = "#dddddd"
STYLE = {
    "svg.hashsalt": "bids_varaug",
    "font.size": FONT,
    "axes.edgecolor": INK,
    "text.parse_math": False,
    "savefig.dpi": 150,
}


def draw_ages(predictions: pd.DataFrame) -> str:
    """Predicted against true age, with prediction intervals and numerical spread.

    Parameters
    ----------
    predictions : rows of one augmentation of `Study.predictions`
        Of more than 150 observations, intervals of 150 spread evenly over age are drawn.

    Returns
    -------
    SVG
    """
    table = predictions.sort_values("age", kind="stable")
    with _style():
        figure = Figure(figsize=(7.6, 6.4))
        axes = figure.add_axes((0.1, 0.1, 0.88, 0.8))
        limits = table[["age", "predicted", "lower", "upper"]].to_numpy(float)
        limits = limits[np.isfinite(limits)]
        low, high = (limits.min(), limits.max()) if limits.size else (0.0, 100.0)
        margin = 0.03 * (high - low) + 0.5
        axes.plot([low, high], [low, high], color="#777777", linewidth=1, dashes=(4, 3), zorder=1,
                  label="predicted = true")  # fmt: skip
        chosen = np.unique(np.linspace(0, len(table) - 1, SHOWN_INTERVALS).round().astype(int))
        part = table.iloc[chosen] if len(table) > SHOWN_INTERVALS else table
        some = f" of {len(part)} of {len(table)}" if len(part) < len(table) else ""
        if part["lower"].notna().any():
            axes.vlines(part["age"], part["lower"], part["upper"], color="#9ecae1", linewidth=1.2,
                        zorder=1.5, label=f"prediction interval{some}")  # fmt: skip
        axes.plot(
            table["age"], table["predicted"], "o", color=COLORS["mean"], alpha=0.75,
            markersize=_marker_size(len(table)), markeredgewidth=0, zorder=3,
            rasterized=len(table) > RASTER_FROM, label="image",
        )  # fmt: skip
        if part["sd_num"].notna().any():
            axes.vlines(part["age"], part["predicted"] - part["sd_num"],
                        part["predicted"] + part["sd_num"], color=COLORS["members"],
                        linewidth=1.8, zorder=4,
                        label=f"± numerical standard deviation{some}")  # fmt: skip
        ages = table["age"].to_numpy(float)
        pad = 0.03 * (ages.max() - ages.min()) + 0.5
        axes.set_xlim(ages.min() - pad, ages.max() + pad)
        axes.set_ylim(low - margin, high + margin)
        axes.set_xlabel("true age [years]")
        axes.set_ylabel("predicted age, out of sample [years]")
        _bare(axes)
        figure.legend(loc="upper left", bbox_to_anchor=(0.09, 1.0), ncols=2, frameon=False,
                      fontsize=FONT - 0.5)  # fmt: skip
        return _svg(figure)


def draw_ranked(predictions: pd.DataFrame) -> str:
    """Predicted ages in ascending order, with intervals and numerical spread; no age is needed.

    Parameters
    ----------
    predictions : of `model_file.apply_model`

    Returns
    -------
    SVG
    """
    table = predictions.sort_values("predicted", kind="stable")
    rank, predicted = np.arange(1, len(table) + 1), table["predicted"]
    with _style():
        figure = Figure(figsize=(7.6, 4.8))
        axes = figure.add_axes((0.1, 0.13, 0.88, 0.76))
        if table["lower"].notna().any():
            axes.vlines(rank, table["lower"], table["upper"], color="#9ecae1", linewidth=1.2,
                        label="prediction interval")  # fmt: skip
        axes.plot(
            rank, predicted, "o", color=COLORS["mean"], alpha=0.75, markeredgewidth=0,
            markersize=_marker_size(len(table)), rasterized=len(table) > RASTER_FROM,
            label="image",
        )  # fmt: skip
        if table["sd_num"].notna().any():
            axes.vlines(rank, predicted - table["sd_num"], predicted + table["sd_num"],
                        color=COLORS["members"], linewidth=1.8, zorder=4,
                        label="± numerical standard deviation")  # fmt: skip
        axes.set_xlabel("image, in the order of predicted age")
        axes.set_ylabel("predicted age [years]")
        _bare(axes)
        figure.legend(loc="upper left", bbox_to_anchor=(0.09, 1.0), ncols=3, frameon=False,
                      fontsize=FONT - 0.5)  # fmt: skip
        return _svg(figure)


def draw_gains(gains: pd.DataFrame) -> str:
    """Paired gain of each augmentation with its 95 % limits; controls apart.

    Parameters
    ----------
    gains : `Study.gains`
    """
    order = [a for a in gains["augmentation"] if a not in CONTROLS]
    order += [a for a in gains["augmentation"] if a in CONTROLS]
    rows = gains.set_index("augmentation").loc[order]
    height = 1.2 + 0.46 * len(rows)
    with _style():
        figure = Figure(figsize=(8.2, height))
        axes = figure.add_axes((0.2, 0.6 / height, 0.47, 1 - 1.0 / height))
        for y, (name, row) in enumerate(rows.iterrows()):
            color = COLORS.get(name, OTHER_COLOR)
            axes.plot([row["low"], row["high"]], [y, y], color=color, linewidth=2.4)
            axes.plot(row["gain"], y, MARKERS.get(name, "o"), color=color, markersize=8)
            text = (f"{signed(row['gain'])}  [{signed(row['low'])}, {signed(row['high'])}]"
                    f"   p {p_text(row['p_value'])}")  # fmt: skip
            axes.text(1.03, y, text, transform=axes.get_yaxis_transform(), va="center",
                      fontsize=FONT - 0.5)  # fmt: skip
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(
            range(len(rows)), [f"{n} (control)" if n in CONTROLS else n for n in rows.index]
        )
        axes.set_ylim(len(rows) - 0.5, -0.5)
        reach = np.nanmax(np.abs(rows[["low", "high", "gain"]].to_numpy(float)))
        reach = 1.1 * reach if reach > 0 else 1.0
        axes.set_xlim(-reach, reach)
        axes.set_xlabel("gain in mean absolute error over 'none' [years]")
        axes.text(0.0, 1.02, "← worse", transform=axes.transAxes, color="#57606a")
        axes.text(1.0, 1.02, "better →", transform=axes.transAxes, color="#57606a", ha="right")
        _bare(axes, left=False)
        return _svg(figure)


def draw_learning_curve(curve: pd.DataFrame) -> str:
    """Mean absolute error against the number of training participants.

    Parameters
    ----------
    curve : `Study.learning_curve`
    """
    with _style():
        figure = Figure(figsize=(8.2, 4.6))
        axes = figure.add_axes((0.09, 0.12, 0.68, 0.84))
        names = list(dict.fromkeys(curve["augmentation"]))
        for number, name in enumerate(names):
            rows = curve[curve["augmentation"] == name].sort_values("n_participants")
            # A little apart, so that limits of equal values do not hide each other.
            x = rows["n_participants"] * 1.018 ** (number - (len(names) - 1) / 2)
            color = COLORS.get(name, OTHER_COLOR)
            axes.vlines(x, rows["low"], rows["high"], color=color, linewidth=1.2, alpha=0.6)
            axes.plot(x, rows["mae"], LINES.get(name, "-"), marker=MARKERS.get(name, "o"),
                      color=color, markersize=5.5, linewidth=1.5, label=name)  # fmt: skip
        ticks = sorted(set(curve["n_participants"]))
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{t:,.0f}" for t in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("training participants (logarithmic)")
        axes.set_ylabel("mean absolute error [years]")
        _bare(axes)
        figure.legend(loc="upper left", bbox_to_anchor=(0.78, 0.97), frameon=False)
        return _svg(figure)


def draw_ratios(
    numerics: pd.DataFrame, others: Sequence[tuple[str, pd.DataFrame]] = (), max_rows: int = 80
) -> str:
    """Numerical against anatomical standard deviation of each structure, with 95 % limits.

    Parameters
    ----------
    numerics : table of `population.numerical_variability`
    others : name and table of each pipeline to compare with
    max_rows : structures shown, the first ones of the table
    """
    table = numerics.assign(index=np.arange(1, len(numerics) + 1))
    names = dict(zip(table["index"], table["name"], strict=True))
    order = [names[i] for i in pair_sides(table[["index", "name"]])][:max_rows]
    series = [("this ensemble", numerics, COLORS["mean"], "o")]
    looks = (("#d55e00", "D"), ("#009e73", "^"), ("#cc79a7", "s"))
    series += [(name, other, *looks[n % len(looks)]) for n, (name, other) in enumerate(others)]
    height = 1.4 + 0.25 * len(order)
    with _style():
        figure = Figure(figsize=(8.8, height))
        axes = figure.add_axes((0.27, 0.65 / height, 0.7, 1 - 1.15 / height))
        values = []
        for number, (label, data, color, marker) in enumerate(series):
            rows = data.set_index("name").reindex(order)
            shift = 0.2 * (number - (len(series) - 1) / 2)
            y = np.arange(len(order)) + shift
            ratio, low, high = (
                rows[c].replace([np.inf, 0], np.nan).to_numpy(float)
                for c in ("ratio", "low", "high")
            )
            axes.hlines(y, low, high, color=color, linewidth=1.6, alpha=0.7)
            axes.plot(ratio, y, marker, color=color, markersize=5, label=label, linestyle="none")
            values.append(np.concatenate([ratio, low, high]))
        for row in range(1, len(order), 2):
            axes.axhspan(row - 0.5, row + 0.5, color="#f5f6f8", zorder=0)
        shown = np.concatenate(values)
        shown = shown[np.isfinite(shown)]
        axes.set_xscale("log")
        if shown.size:
            axes.set_xlim(0.9 * shown.min(), 1.1 * max(shown.max(), 1.0))
        low, high = axes.get_xlim()
        ticks = [t for t in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
                 if low <= t <= high]  # fmt: skip
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.set_xticks([], minor=True)
        axes.axvline(1, color="#777777", linewidth=1, dashes=(4, 3))
        axes.set_yticks(range(len(order)), [short_name(str(n)) for n in order], fontsize=FONT - 1)
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.set_xlabel("numerical / anatomical standard deviation (logarithmic; 1: equal)")
        _bare(axes, left=False)
        if len(series) > 1:
            figure.legend(loc="upper left", bbox_to_anchor=(0.26, 1.0), ncols=len(series),
                          frameon=False)  # fmt: skip
        return _svg(figure)


def signed(value: float) -> str:
    """Number with sign and two decimals (three where two would be 0.00), a true minus.

    Examples
    --------
    >>> signed(0.314), signed(-0.0042), signed(0.0)
    ('+0.31', '−0.004', '+0.00')
    """
    digits = 3 if 0 < abs(value) < 0.005 else 2
    return f"{value:+.{digits}f}".replace("-", "−")


def p_text(p_value: float) -> str:
    """P-value as it is written after the letter p.

    Examples
    --------
    >>> p_text(0.0002), p_text(0.034)
    ('< 0.001', '= 0.034')
    """
    if np.isnan(p_value):
        return "n/a"
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"


def _marker_size(n: int) -> float:
    return 5.5 if n <= 200 else 3.5 if n <= RASTER_FROM else 2.0


def _bare(axes, left: bool = True) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines["left"].set_visible(left)
    axes.grid(axis="both" if left else "x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    if not left:
        axes.tick_params(axis="y", length=0)


def _style():
    # "default" first, so that a user's matplotlibrc does not change the bytes.
    return matplotlib.style.context(["default", STYLE])


def _svg(figure: Figure) -> str:
    figure.set_facecolor("white")
    stream = io.StringIO()
    FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Creator": None})
    # The document type names a file on the network; browsers do not need it.
    return re.sub(r"^.*?(?=<svg)", "", stream.getvalue(), count=1, flags=re.S)
