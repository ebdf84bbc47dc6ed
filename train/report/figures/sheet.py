"""A sheet of panels: bars and curves that look alike in every figure, and the numbers behind each as rows.

Figures are objects of their own (no pyplot): nothing is shared between two of them. A panel without data says why.
"""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from common.files import write_file
from train.report.figures.scales import LONGEST, ends_of, limit_of, number, shortened
from train.report.figures.shapes import Bar, Curve, Row
from train.report.palette import HUES, MARKERS, NEUTRAL

DPI = 150
HEADER, FOOTER = 0.72, 0.3  # inches for the title and for the remark at the foot
ORDERS, CURVE_ORDERS = 30.0, 8.0  # positive values that differ by more than this have a logarithmic axis
KEY_LINE = 0.19  # inches of a line of the key
MANY = 8  # lines from which on they are thin

__all__ = ["KEY_LINE", "Axes", "Sheet", "title_of"]


class Sheet:
    """A figure being made: its panels, its legend and its rows.

    Args:
        title: what it shows; `subtitle`: what was run.
        widths: inches of each column of panels; `heights` of each row.
        remark: a line at the foot: what bars, dots and bands are.
        beside: inches for a key at the right.
    """

    def __init__(
        self,
        title: str,
        subtitle: str,
        widths: Sequence[float],
        heights: Sequence[float],
        remark: str = "",
        beside: float = 0.0,
    ) -> None:
        width, height = sum(widths) + beside, sum(heights) + HEADER + FOOTER
        self.figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.beside = 1 - beside / width  # where the key begins
        rect = (0.0, FOOTER / height, self.beside, 1 - (HEADER + FOOTER) / height)
        self.figure.set_layout_engine("constrained", rect=rect, w_pad=0.12, h_pad=0.1)
        self.grid = self.figure.add_gridspec(len(heights), len(widths), width_ratios=widths, height_ratios=heights)
        wide = int(width * 14)  # characters of the small lines that fit
        self.figure.text(0.12 / width, 1 - 0.14 / height, title, fontsize=14, fontweight="bold", va="top")
        self.figure.text(
            0.12 / width, 1 - 0.46 / height, shortened(subtitle, wide), fontsize=9, color=NEUTRAL, va="top"
        )
        self.figure.text(0.12 / width, 0.1 / height, shortened(remark, wide), fontsize=8, color=NEUTRAL)
        self.rows: list[Row] = []

    def panel(self, row: int | slice, column: int | slice, title: str) -> Axes:
        """An empty panel."""
        axes = self.figure.add_subplot(self.grid[row, column])
        axes.set_title(title, fontsize=10, loc="left")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        return axes

    def label(self, axes: Axes, x: str, y: str) -> None:
        """Name the axes, with their units, and draw a light grid."""
        axes.set_xlabel(x, fontsize=9)
        axes.set_ylabel(y, fontsize=9)
        axes.grid(color="#E5E5E5", linewidth=0.6)
        axes.set_axisbelow(True)

    def nothing(self, axes: Axes, why: str, row: bool = True) -> None:
        """Say in a panel why it has no data, and in the rows unless they have it already."""
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        width_in = self.figure.get_size_inches()[0] * axes.get_position().width
        lines = textwrap.wrap(why, max(int(width_in * 9), 28))
        text = "\n".join(lines[:10] + ["…"] * (len(lines) > 10))
        axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=9, color=NEUTRAL, transform=axes.transAxes)
        if row:
            self.rows.append(Row(title_of(axes), "", note=why))

    def bars(self, axes: Axes, bars: Sequence[Bar], unit: str, names: bool = True, linear: bool = False) -> None:
        """Horizontal bars, the first one on top, each with its number; `names` on the left.

        Logarithmic where positive values span orders, unless `linear`.
        """
        if all(bar.value is None for bar in bars):
            return self.nothing(axes, "; ".join(dict.fromkeys(bar.text for bar in bars if bar.text)) or "no data")
        values = [v for bar in bars for v in (bar.value, bar.low, bar.high, bar.mark, *bar.each) if v is not None]
        values = [value for value in values if abs(value) <= limit_of(values)]
        logarithmic = not linear and min(values) > 0 and max(values) > ORDERS * min(values)
        start = min(values) / 2 if logarithmic else 0.0
        for place, bar in enumerate(bars):
            self._bar(axes, place, bar, start, min(values), max(values))
        if logarithmic:
            axes.set_xscale("log")
            axes.set_xlim(start, max(values) * (max(values) / start) ** 0.45)
        else:
            low, high = min(0.0, *values), max(0.0, *values)
            reach = (high - low) or 1.0
            axes.set_xlim(low - 0.02 * reach * (low < 0), high + 0.45 * reach)
            axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_yticks(range(len(bars)), [shortened(bar.label, LONGEST) if names else "" for bar in bars])
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(unit + (" (log scale)" if logarithmic else ""), fontsize=9)
        axes.grid(axis="x", color="#E5E5E5", linewidth=0.6)
        axes.set_axisbelow(True)
        return None

    def _bar(self, axes: Axes, place: int, bar: Bar, start: float, least: float, most: float) -> None:
        if bar.value is None:
            axes.annotate(
                shortened(bar.text or "no data", 44), (0.01, place), xycoords=axes.get_yaxis_transform(), va="center",
                fontsize=7.5, style="italic", color=NEUTRAL,
            )  # fmt: skip
            return
        reach = min(max(bar.value, min(least, start)), most)
        axes.barh(place, reach - start, left=start, height=0.62, color=bar.colour, alpha=0.85)
        if bar.low is not None and bar.high is not None:
            axes.hlines(place, bar.low, bar.high, color="black", linewidth=1.2)
        if len(bar.each) > 1:
            axes.plot(
                bar.each, [place] * len(bar.each), ".", color="white", markeredgecolor="black", markersize=5, mew=0.6
            )
        if bar.mark is not None:
            axes.vlines(bar.mark, place - 0.45, place + 0.45, color="black", linewidth=1.6, linestyle="dotted")
        end = min(max(v for v in (bar.value, bar.high, bar.mark, start) if v is not None), most)
        half = (bar.high - bar.low) / 2 if bar.low is not None and bar.high is not None else 0.0
        beyond = "" if reach == bar.value else "(cut off)"
        text = " ".join(filter(None, [number(bar.value, half), bar.text, beyond]))
        axes.annotate(
            shortened(text, 48), (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5
        )

    def curves(
        self, axes: Axes, curves: Sequence[Curve], x: str, y: str, why: str = "no data", zero: bool = False
    ) -> None:
        """Lines over one axis; logarithmic where positive values span orders, unless it is to start at `zero`."""
        drawn = [curve for curve in curves if len(curve.x)]
        if not drawn:
            return self.nothing(axes, why)
        for curve in drawn:
            wide = 0.9 if curve.thin else 1.7 if len(drawn) < MANY else 1.2
            axes.plot(
                curve.x, curve.y, color=curve.colour, linestyle=curve.dash, linewidth=wide, marker=curve.marker or None,
                markersize=4.5, alpha=0.95, zorder=2 if curve.thin else 3,
            )  # fmt: skip
            if curve.band is not None:
                axes.fill_between(curve.x, *curve.band, color=curve.colour, alpha=0.18, linewidth=0)
            if len(curve.x) == 1 and not curve.marker:
                axes.plot(curve.x, curve.y, "o", color=curve.colour, markersize=4)
        values = [value for curve in drawn for value in curve.y if math.isfinite(value)]
        near = [value for value in values if abs(value) <= limit_of(values)]
        if near and not zero and min(near) > 0 and max(near) > CURVE_ORDERS * min(near):
            axes.set_yscale("log")
            decades = math.log10(max(near) / min(near))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            y = f"{y} (log scale)".strip()
        if near and max(values) > max(near):
            axes.set_ylim(*ends_of(near, axes.get_yscale()))
            y = f"{y}, cut off"
        self.label(axes, x, y)
        if x == "step":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_major_locator(MaxNLocator(5))
        return None

    def marks(
        self, axes: Axes, points: dict[str, list[tuple[int, float]]], labels: Sequence[str], unit: str, why: str
    ) -> None:
        """Values of several sorts for each label, a marker each: `points` of a sort are (label's place, value)."""
        if not points:
            return self.nothing(axes, why)
        values = [value for sort in points.values() for _, value in sort]
        for place, (name, sort) in enumerate(points.items()):
            where, x = [place for place, _ in sort], [value for _, value in sort]
            colour, marker = HUES[place % len(HUES)], MARKERS[place % len(MARKERS)]
            axes.plot(x, where, marker, color=colour, markersize=5.5, label=name, linestyle="none", alpha=0.85)
        near = [value for value in values if abs(value) <= limit_of(values)]
        if min(near) > 0 and max(near) > ORDERS * min(near):
            axes.set_xscale("log")
            unit += " (log scale)"
        if max(values) > max(near):
            axes.set_xlim(*ends_of(near, axes.get_xscale()))
            unit += ", cut off"
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_yticks(range(len(labels)), [shortened(label, LONGEST) for label in labels])
        axes.tick_params(axis="y", length=0)
        self.label(axes, unit, "")
        axes.legend(  # below the axis' own label, whose place is known in points alone
            loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=4.4, fontsize=7.5, frameon=False, ncols=4,
            handletextpad=0.1, columnspacing=1.0,
        )  # fmt: skip
        return None

    def dashes(self, axes: Axes, dashes: dict[str, Any]) -> None:
        """A small key inside a panel: what its line styles stand for."""
        handles = [Line2D([], [], color=NEUTRAL, linestyle=dash, linewidth=1.3) for dash in dashes.values()]
        if handles:
            size, columns = (7, 1) if len(handles) <= 6 else (6, 2)
            axes.legend(
                handles, list(dashes), fontsize=size, ncols=columns, edgecolor="none", framealpha=0.8, handlelength=2.6
            )

    def legend(self, entries: Sequence[tuple[str, str, Any, str]]) -> None:
        """A key at the right of all panels: label, colour, dash and marker of each."""
        if not entries:
            return
        handles = [
            Line2D([], [], color=colour, linestyle=dash, linewidth=1.8, marker=marker or None, markersize=5)
            for _, colour, dash, marker in entries
        ]
        labels = [shortened(label, LONGEST) for label, *_ in entries]
        height = self.figure.get_size_inches()[1]
        columns = math.ceil(len(entries) / max(int((height - HEADER - FOOTER) / KEY_LINE), 1))
        self.figure.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(self.beside, 1 - HEADER / height), fontsize=8,
            frameon=False, ncols=columns, handlelength=2.6, borderaxespad=0, columnspacing=1.0,
        )  # fmt: skip

    def save(self, folder: Path, name: str) -> list[Path]:
        """`<name>.png` and `<name>.csv` in a folder; their paths."""
        picture = io.BytesIO()
        self.figure.savefig(picture, format="png", dpi=self.figure.dpi, metadata={"Software": None})
        write_file(folder / f"{name}.png", picture.getvalue())
        write_file(folder / f"{name}.csv", self.csv().encode())
        return [folder / f"{name}.png", folder / f"{name}.csv"]

    def csv(self) -> str:
        """The rows with a heading; what is not known is empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(blank(asdict(row)) for row in self.rows)
        return text.getvalue()


def title_of(axes: Axes) -> str:
    """The title of a panel."""
    return axes.get_title(loc="left")


def blank(row: dict[str, Any]) -> dict[str, Any]:
    """What is not a number as an empty cell."""
    return {key: "" if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
