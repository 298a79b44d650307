"""The plot of every structure's volume in every member, relative to their mean."""

from __future__ import annotations

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bids_varaug.reports.figures import to_png

DPI = 130
FAMILY_COLORS = {"mca": "#0072b2", "seed": "#d55e00", "rr": "#009e73"}  # Okabe-Ito
OTHER_COLOR = "#cc79a7"
BASELINE = "ieee"


def draw_volumes(members: pd.DataFrame, max_rows: int = 80) -> bytes:
    """Volumes of every structure, one dot per member, relative to the mean of the members.

    The mean is over the perturbed members. The axis is linear within 1 % and logarithmic beyond,
    so that structures of 0.3 % and of 30 % spread both show it. With a single member volumes
    are drawn in mm3 on a logarithmic axis.

    Parameters
    ----------
    members : table with columns member, family, index, name, volume [mm3]
    max_rows : structures shown, the first ones of the table

    Returns
    -------
    PNG file
    """
    order = pair_sides(members.drop_duplicates("index"))[:max_rows]
    names = dict(zip(members["index"], members["name"], strict=True))
    relative = members["member"].nunique() > 1
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(10.5, 1.05 + 0.235 * len(order)), dpi=DPI, facecolor="white")
        canvas = FigureCanvasAgg(figure)
        height = figure.get_figheight()
        axes = figure.add_axes((0.22, 0.55 / height, 0.6, 1 - 1.0 / height))
        for row, index in enumerate(order):
            _draw_row(axes, row, members[members["index"] == index], relative)
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.set_yticks(range(len(order)))
        axes.set_yticklabels(
            [short_name(str(names[i])) for i in order], fontsize=8, parse_math=False
        )
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        _scale_volume_axis(axes, relative)
        _add_volume_legend(figure, axes, members, relative)
        return to_png(canvas)


def _draw_row(axes, row: int, table: pd.DataFrame, relative: bool) -> None:
    """One structure: dots and the numbers at the right."""
    table = table.sort_values("member", kind="stable")
    perturbed = table[table["family"] != BASELINE]
    base = perturbed if len(perturbed) else table
    mean = float(base["volume"].mean())
    if row % 2:
        axes.axhspan(row - 0.5, row + 0.5, color="#f5f6f8", zorder=0)
    right = f"{mean:,.0f} mm³"
    if relative and mean > 0 and len(base) > 1:
        right += f"   ± {100 * base['volume'].std(ddof=1) / mean:.1f} %"
    axes.text(
        1.01,
        row,
        right,
        transform=axes.get_yaxis_transform(),
        fontsize=7.5,
        va="center",
        parse_math=False,
    )
    if relative and not mean > 0:
        return  # absent in all perturbed members: nothing to be relative to

    def place(volume):
        return 100 * (volume / mean - 1) if relative else volume

    families = sorted(set(perturbed["family"]))
    for number, family in enumerate(families):
        # Families a little apart, so that equal volumes do not hide each other.
        shift = 0.16 * (2 * number - (len(families) - 1)) / max(1, len(families) - 1)
        values = place(perturbed.loc[perturbed["family"] == family, "volume"].to_numpy(float))
        axes.plot(
            values,
            np.full(len(values), row + shift),
            "o",
            markersize=4.2,
            alpha=0.8,
            color=FAMILY_COLORS.get(family, OTHER_COLOR),
            markeredgewidth=0,
        )
    baseline = place(table.loc[table["family"] == BASELINE, "volume"].to_numpy(float))
    axes.plot(
        baseline,
        np.full(len(baseline), row),
        "D",
        markersize=4.6,
        markerfacecolor="none",
        markeredgecolor="black",
        markeredgewidth=1.0,
        zorder=4,
    )


def _scale_volume_axis(axes, relative: bool) -> None:
    if not relative:
        axes.set_xscale("log")
        axes.set_xlabel("volume [mm³]", fontsize=8.5)
        return
    low, high = axes.dataLim.intervalx if np.isfinite(axes.dataLim.intervalx).all() else (-1, 1)
    reach = max(1.0, abs(low), abs(high)) * 1.15
    axes.set_xscale("symlog", linthresh=1.0, linscale=1.0)
    axes.set_xlim(-reach, reach)
    half = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100, 300, 1000) if t <= reach]
    ticks = [-t for t in reversed(half)] + [0] + half
    axes.set_xticks(ticks)
    axes.set_xticks([], minor=True)
    axes.set_xticklabels([f"{t:+g}".replace("-", "−") if t else "0" for t in ticks], fontsize=8)
    axes.axvline(0, color="#777777", linewidth=0.8, zorder=1)
    axes.set_xlabel(
        "difference from the mean of the perturbed members [%]  (linear to ±1 %, then logarithmic)",
        fontsize=8.5,
    )


def _add_volume_legend(figure: Figure, axes, members: pd.DataFrame, relative: bool) -> None:
    families = sorted(set(members["family"]) - {BASELINE})
    handles = [
        axes.plot([], [], "o", color=FAMILY_COLORS.get(f, OTHER_COLOR), label=f"{f} members")[0]
        for f in families
    ]
    if (members["family"] == BASELINE).any():
        handles += axes.plot(
            [],
            [],
            "D",
            markerfacecolor="none",
            markeredgecolor="black",
            label="ieee (unperturbed)",
        )
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.21, 1.0),
        fontsize=8.5,
        ncols=len(handles),
        frameon=False,
    )
    figure.text(
        0.826,
        1 - 0.21 / figure.get_figheight(),
        "mean   ± SD" if relative else "volume",
        fontsize=8.5,
        va="center",
    )


def short_name(name: str) -> str:
    """FreeSurfer name with its side behind.

    Examples
    --------
    >>> short_name("Left-Cerebral-White-Matter"), short_name("Brain-Stem")
    ('Cerebral White Matter  L', 'Brain Stem')
    """
    for side, mark in (("Left-", "  L"), ("Right-", "  R")):
        if name.startswith(side):
            return name[len(side) :].replace("-", " ") + mark
    return name.replace("-", " ")


def pair_sides(structures: pd.DataFrame) -> list[int]:
    """Indices in the table's order, each right structure just after its left one."""
    first: dict[str, int] = {}
    ranks = []
    for position, (index, name) in enumerate(
        zip(structures["index"], structures["name"], strict=True)
    ):
        bare = str(name).removeprefix("Left-").removeprefix("Right-")
        ranks.append((first.setdefault(bare, position), position, int(index)))
    return [index for _, _, index in sorted(ranks) if index != 0]
