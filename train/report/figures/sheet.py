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
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from PIL import Image

from train.report.figures.scales import LONGEST, ends_of, near, near_of_curves, not_beyond, number, shortened, spans
from train.report.figures.shapes import Bar, Curve, Row
from train.report.palette import MARKERS, NEUTRAL

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
    """

    def __init__(
        self,
        title: str,
        subtitle: str,
        widths: Sequence[float],
        heights: Sequence[float],
        remark: str = "",
    ) -> None:
        self.width, self.height = sum(widths), sum(heights) + HEADER + FOOTER
        self.figure = Figure(figsize=(self.width, self.height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.layout = ConstrainedLayoutEngine(rect=self._panels(self.width), w_pad=0.12, h_pad=0.1)
        self.figure.set_layout_engine(self.layout)
        self.grid = self.figure.add_gridspec(len(heights), len(widths), width_ratios=widths, height_ratios=heights)
        wide = int(self.width * 15)  # characters of the small lines that fit
        self._write(self.height - 0.14, title, fontsize=14, fontweight="bold")
        self._write(self.height - 0.46, shortened(subtitle, wide), fontsize=9, color=NEUTRAL)
        self._write(0.22, shortened(remark, wide), fontsize=8, color=NEUTRAL)
        self.rows: list[Row] = []

    def _write(self, up: float, text: str, **look: Any) -> None:
        """A line at the left, with its top so many inches up."""
        self.figure.text(0.12, up, text, va="top", transform=self.figure.dpi_scale_trans, **look)

    def _panels(self, width: float) -> tuple[float, float, float, float]:
        """Where panels lie in a figure of so many inches: left, bottom, width and height as shares."""
        return 0.0, FOOTER / self.height, self.width / width, 1 - (HEADER + FOOTER) / self.height

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

    def bars(self, axes: Axes, bars: Sequence[Bar], unit: str, names: int = LONGEST, linear: bool = False) -> None:
        """Horizontal bars, the first one on top, each with its number; on the left `names`, so many characters of them.

        Logarithmic where positive values span orders, unless `linear`.
        """
        if all(bar.value is None for bar in bars):
            return self.nothing(axes, "; ".join(dict.fromkeys(bar.text for bar in bars if bar.text)) or "no data")
        values = near([v for bar in bars for v in (bar.value, bar.low, bar.high, bar.mark, *bar.each) if v is not None])
        logarithmic = not linear and spans(values, ORDERS)
        start = min(values) / 2 if logarithmic else 0.0
        for place, bar in enumerate(bars):
            self._bar(axes, place, bar, start, min(values), max(values))
        if logarithmic:
            axes.set_xscale("log")
            low, high, ticks = start, max(values), LogLocator().tick_values(start, max(values))
            axes.set_xlim(low, high * (high / low) ** 0.45)
        else:
            low, high = min(0.0, *values), max(0.0, *values)
            ticks = MaxNLocator(4).tick_values(low, high)
            reach = (high - low) or 1.0
            axes.set_xlim(low - 0.02 * reach * (low < 0), high + 0.45 * reach)
        axes.set_xticks([tick for tick in ticks if low <= tick <= high])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.spines["bottom"].set_bounds(low, high)  # the rest is for numbers
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_yticks(range(len(bars)), [shortened(bar.label, names) if names else "" for bar in bars])
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
        shown = not_beyond(values)
        if not zero and spans(found := near_of_curves(drawn), CURVE_ORDERS):
            shown = found
            axes.set_yscale("log")
            decades = math.log10(max(shown) / min(shown))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            y = f"{y} (log scale)".strip()
        if len(shown) < len(values):
            axes.set_ylim(*ends_of(shown, axes.get_yscale()))
            y = f"{y}, cut off"
        self.label(axes, x, y)
        if x == "step":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_major_locator(MaxNLocator(5))
        return None

    def marks(
        self,
        axes: Axes,
        points: dict[str, list[tuple[int, float]]],
        labels: Sequence[str],
        hues: Sequence[str],
        unit: str,
        why: str,
    ) -> None:
        """Values of several sorts for each label, of its hue, a marker each: `points` of a sort are (place, value)."""
        if not points:
            return self.nothing(axes, why)
        values = [value for sort in points.values() for _, value in sort]
        for number_of_sort, (name, sort) in enumerate(points.items()):
            marker = MARKERS[number_of_sort % len(MARKERS)]
            where, x, own = [place for place, _ in sort], [v for _, v in sort], [hues[place] for place, _ in sort]
            axes.scatter(x, where, s=34, c=own, marker=marker, alpha=0.85, linewidths=0.5, edgecolors="white")
            axes.plot([], [], marker, color=NEUTRAL, markersize=5.5, label=name, linestyle="none")
        shown = not_beyond(values)
        if spans(found := near(values), ORDERS):
            shown = found
            axes.set_xscale("log")
            unit += " (log scale)"
        if len(shown) < len(values):
            axes.set_xlim(*ends_of(shown, axes.get_xscale()))
            unit += ", cut off"
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_yticks(range(len(labels)), [shortened(label, LONGEST) for label in labels])
        axes.tick_params(axis="y", length=0)
        self.label(axes, unit, "")
        axes.legend(  # below the axis' own label, whose place is known in points alone
            loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=4.4, fontsize=7.5, frameon=False,
            ncols=3 if len(points) < 6 else 2, handletextpad=0.1, columnspacing=1.0,
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
        """A key at the right of all panels, which makes room for it: label, colour, dash and marker of each."""
        if not entries:
            return
        handles = [
            Line2D([], [], color=colour, linestyle=dash, linewidth=1.8, marker=marker or None, markersize=5)
            for _, colour, dash, marker in entries
        ]
        labels = [shortened(label, LONGEST) for label, *_ in entries]
        columns = math.ceil(len(entries) / max(int((self.height - HEADER - FOOTER) / KEY_LINE), 1))
        width = self.width + columns * (0.65 + 0.068 * max(len(label) for label in labels))
        self.figure.set_size_inches(width, self.height)
        self.layout.set(rect=self._panels(width))
        self.figure.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(self.width / width, 1 - HEADER / self.height),
            fontsize=8, frameon=False, ncols=columns, handlelength=2.6, borderaxespad=0, columnspacing=1.0,
        )  # fmt: skip

    def png(self) -> bytes:
        """The picture in 256 colours, a third of the size; of equal files the same bytes."""
        drawn, picture = io.BytesIO(), io.BytesIO()
        self.figure.savefig(drawn, format="png", dpi=self.figure.dpi, pil_kwargs={"compress_level": 0})
        colours = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        colours.save(picture, "png", optimize=True, dpi=(DPI, DPI))
        return picture.getvalue()

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
