"""The charts of a report as PNGs, drawn with matplotlib: no display, no network."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raywb import __version__
from raywb.errors import SettingsError
from raywb.view.report.contents import Contents
from raywb.view.report.heat_map import HeatMap, node_heat_maps
from raywb.view.report.series import Band, namespaces_of, pipelines_of, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MOST_PICTURES", "Pictures", "draw_pictures"]

#: Pictures of stages and of pipelines; what is beyond is in the HTML file.
MOST_PICTURES = 24

#: Charts in one picture.
MOST_CHARTS = 12

_COLUMNS = 3
_DPI = 110
_WIDTH_IN = 12.8

#: PNGs of ours say so, and may be replaced by newer ones.
_SOFTWARE = f"raywb {__version__}"

_STYLE = {
    "text.parse_math": False,  # a key with a dollar sign is no formula
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666e7f",
    "axes.labelcolor": "#4a5161",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e1e4ea",
    "grid.linewidth": 0.8,
    "xtick.color": "#4a5161",
    "ytick.color": "#4a5161",
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 6),
}

_UNKNOWN = "#d8d3c8"

#: The page's, which are told apart with every kind of colour vision; the last is for troubles.
_COLOURS = ("#0068b3", "#d25500", "#00886a", "#b0508f", "#c58a00", "#2f9fd8", "#6b5bd2", "#5c6470")
_BAD = "#c0262d"
_HEAT = ("#edf1fb", "#c9d6f8", "#94aef0", "#5d80e3", "#3350c0", "#182a78")


@dataclass
class Pictures:
    """What was drawn.

    Attributes:
        files: in the order in which they were drawn.
        left_out: what was not, each in a few words.
    """

    files: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def draw_pictures(contents: Contents, directory: Path) -> Pictures:
    """Draw the charts of a report into a directory, which is made.

    Raises:
        SettingsError: matplotlib is not installed, or the directory cannot be written to, or
            holds a file of the same name that is no picture of ours.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise SettingsError(
            f"PNGs are drawn with matplotlib: `pip install 'raywb[report]'` ({error})"
        ) from error
    matplotlib.use("Agg")
    drawing = _Drawing(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(_STYLE), _any_letter():
            for run in contents.overview["runs"]:
                drawing.run(contents, run)
            drawing.delivery(contents)
    except OSError as error:
        raise SettingsError(f"pictures cannot be written to {directory}: {error}") from error
    return drawing.done()


@contextmanager
def _any_letter() -> Iterator[None]:
    """A letter that the font lacks is a box, which is seen; a warning for each says no more."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        yield


class _Drawing:
    """Draws the pictures of a report one by one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pictures = Pictures()
        self._names: set[str] = set()
        self._not_drawn: list[str] = []
        self._charts_left_out = 0

    def done(self) -> Pictures:
        pictures = self._pictures
        if self._not_drawn:
            first = ", ".join(self._not_drawn[:3])
            more = len(self._not_drawn) - 3
            also = f" and {more} more" if more > 0 else ""
            pictures.left_out.append(f"pictures of {first}{also} (at most {MOST_PICTURES})")
        if self._charts_left_out:
            pictures.left_out.append(
                f"{self._charts_left_out:,} series beyond the first {MOST_CHARTS} of their picture"
            )
        return pictures

    def run(self, contents: Contents, run: Mapping[str, Any]) -> None:
        """Draw the stages, pipelines and nodes of a run."""
        number = str(run["number"])
        bands = shown(contents.series[number], contents.points[number])
        several = len(contents.overview["runs"]) > 1
        prefix = f"{run['name']}_" if several else ""
        for name, group in pipelines_of(bands).items():
            self._charts(f"{prefix}pipeline_{name}", f"Pipeline {name}", run, group)
        for name, group in namespaces_of(bands).items():
            self._charts(f"{prefix}{name}", name, run, group)
        for heat_map in node_heat_maps(bands):
            self._heat_map(f"{prefix}nodes_{heat_map.what}", run, heat_map)

    def _charts(self, name: str, title: str, run: Mapping[str, Any], bands: Sequence[Band]) -> None:
        if len(self._pictures.files) >= MOST_PICTURES:
            self._not_drawn.append(title)
            return
        drawn = bands[:MOST_CHARTS]
        self._charts_left_out += len(bands) - len(drawn)
        columns = min(_COLUMNS, len(drawn))
        rows = -(-len(drawn) // columns)

        def draw(figure: Figure) -> None:
            grid = list(figure.subplots(rows, columns, squeeze=False).flat)
            for place, (axes, band) in enumerate(zip(grid, drawn, strict=False)):
                _draw_band(axes, band, _COLOURS[place % len(_COLOURS)])
            for axes in grid[len(drawn) :]:
                axes.set_visible(False)

        self._save(name, title, run, 0.7 + 2.5 * rows, draw)

    def _heat_map(self, name: str, run: Mapping[str, Any], heat_map: HeatMap) -> None:
        if heat_map.left_out:
            self._pictures.left_out.append(f"{heat_map.left_out:,} nodes of nodes_{heat_map.what}")

        from matplotlib.colors import LinearSegmentedColormap

        def draw(figure: Figure) -> None:
            axes = figure.subplots()
            image = axes.imshow(
                heat_map.values,
                aspect="auto",
                interpolation="nearest",
                cmap=LinearSegmentedColormap.from_list("busy", _HEAT),
                vmin=0,
                vmax=100,
                extent=(heat_map.from_s, heat_map.to_s, len(heat_map.nodes) - 0.5, -0.5),
            )
            axes.grid(visible=False)
            axes.set_facecolor(_UNKNOWN)
            axes.set_yticks(range(len(heat_map.nodes)), [_text(n, 32) for n in heat_map.nodes])
            axes.set_xlabel("nodes/time_s (grey: nothing known)")
            figure.colorbar(image, ax=axes, label="%", pad=0.01, fraction=0.03)

        title = f"Nodes: {heat_map.title}"
        self._save(name, title, run, 1.6 + 0.26 * len(heat_map.nodes), draw)

    def delivery(self, contents: Contents) -> None:
        """Draw where the rows are, and what was lost."""
        from matplotlib.ticker import MaxNLocator

        status = contents.overview.get("status")
        if status is None:
            self._pictures.left_out.append("the delivery, of which nothing is known")
            return
        bars = {
            "received": status["received_rows"],
            "for W&B": status["outbox_rows"],
            "taken by W&B's client": status["sink"]["applied_rows"],
            "confirmed": status["sink"]["confirmed_rows"],
            "backlog": status["backlog_rows"],
            "after finish()": status["after_finish_rows"],
            "rejected values": status["rejected"],
            **{f"lost: {reason}": count for reason, count in status["lost"].items()},
        }
        bad = ("backlog", "lost", "rejected", "after")
        colours = [_BAD if name.startswith(bad) else _COLOURS[0] for name in bars]

        def draw(figure: Figure) -> None:
            axes = figure.subplots()
            drawn = axes.barh(
                [_text(name, 40) for name in bars], list(bars.values()), color=colours
            )
            axes.bar_label(drawn, [f"{count:,}" for count in bars.values()], padding=4)
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
            axes.margins(x=0.12)
            axes.set_xlim(left=0)
            axes.set_xlabel("rows")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.xaxis.set_major_formatter("{x:,.0f}")

        state = f"Delivery: sink {status['sink']['state']}"
        run = {"name": status["run"]["name"]}
        self._save("delivery", state, run, 1.2 + 0.34 * len(bars), draw)

    def _save(
        self,
        name: str,
        title: str,
        run: Mapping[str, Any],
        height_in: float,
        draw: Callable[[Figure], None],
    ) -> None:
        from matplotlib.figure import Figure

        path = self._path(name)
        figure = Figure(figsize=(_WIDTH_IN, max(height_in, 2.4)), dpi=_DPI)
        heading = f"{_text(title, 80)}  ·  {_text(str(run['name']), 60)}"
        figure.suptitle(heading, x=0.008, ha="left", fontsize=12, fontweight="bold")
        draw(figure)
        figure.savefig(path, metadata={"Software": _SOFTWARE})
        self._pictures.files.append(path)

    def _path(self, name: str) -> Path:
        """A file name that every system takes, which no other picture has."""
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:80] or "series"
        stem, number = plain, 1
        while stem.lower() in self._names:
            number += 1
            stem = f"{plain}-{number}"
        self._names.add(stem.lower())
        path = self._directory / f"{stem}.png"
        if path.exists() and not _is_ours(path):
            raise SettingsError(
                f"{path} is no picture of raywb's, so it is left alone: name another directory"
            )
        return path


def _is_ours(path: Path) -> bool:
    with open(path, "rb") as file:
        return b"Software\x00raywb " in file.read(1024)


def _draw_band(axes: Axes, band: Band, colour: str) -> None:
    marker, width = (".", 1.5) if len(band.x) < 40 else ("", 1.2 if len(band.x) < 200 else 0.9)
    axes.fill_between(band.x, band.low, band.high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(band.x, band.mean, color=colour, linewidth=width, marker=marker, markersize=4)
    axes.set_title(_text(band.title, 44))
    axes.set_xlabel(_text(band.axis, 44), fontsize=8)
    axes.margins(x=0.02)


def _text(text: str, most: int) -> str:
    """A name as one line that fits."""
    line = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)
    return line if len(line) <= most else f"{line[: most // 2]}…{line[-(most // 2 - 1) :]}"
