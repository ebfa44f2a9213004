"""Lines of text for a terminal: bars, sparklines, aligned columns; nothing is ever too wide.

Names come from users, so they are made harmless first: no control character reaches the terminal,
no markup is read, and widths are counted in cells, of which a wide character takes two.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import unicodedata
from collections.abc import Callable, Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.text import Text

__all__ = [
    "BAD",
    "DIM",
    "GOOD",
    "ODD",
    "Column",
    "Encodable",
    "Lines",
    "Pen",
    "at_ends",
    "bar",
    "columns",
    "count",
    "counted",
    "cut",
    "duration",
    "joined",
    "middle_cut",
    "number",
    "plain",
    "short",
    "sparkline",
]

#: What colours mean: it is done or well; it wants a look; something is lost or has failed; it is
#: a label, or old.
GOOD, ODD, BAD, DIM = "green", "yellow", "red", "dim"

#: Characters of a name that are looked at; no terminal shows more.
MAX_CHARS = 1_000

#: Cells between two columns.
GAP = 2

#: Columns that are kept no more than this leave before names are shortened.
EXTRA = 1

_LEVELS = "▁▂▃▄▅▆▇█"
_ASCII_LEVELS = "_.,-=+*#"


@dataclasses.dataclass(frozen=True)
class Pen:
    """With what lines are drawn.

    Attributes:
        width: cells of a line.
        now_s: the present, in seconds since the epoch.
        ascii_only: the terminal knows no other characters.
    """

    width: int
    now_s: float
    ascii_only: bool = False

    def ago_s(self, time_s: float) -> float:
        """How long ago something was; clocks of two machines differ, so it is never negative."""
        return max(self.now_s - time_s, 0.0)

    def sign(self, unicode: str, ascii_only: str) -> str:
        """A character that the terminal has."""
        return ascii_only if self.ascii_only else unicode


@dataclasses.dataclass(frozen=True)
class Lines:
    """Lines that are drawn when the width of the console is known."""

    draw: Callable[[Pen], Sequence[Text]]
    now_s: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw them for this console."""
        yield from self.draw(Pen(options.max_width, self.now_s, options.ascii_only))


@dataclasses.dataclass(frozen=True)
class Encodable:
    """Something to print of which the output's encoding need not know every character.

    One that it does not know is shown as so many question marks as it takes cells.
    """

    shown: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Print it with what this console's encoding has."""
        for part in console.render(self.shown, options):
            yield part if part.control else Segment(_known(part.text, options.encoding), part.style)


def _known(text: str, encoding: str) -> str:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(
            char if char.encode(encoding, "ignore") else "?" * cell_len(char) for char in text
        )
    return text


def plain(text: str) -> str:
    """The text without anything that a terminal would obey: one line of visible characters."""
    if text.isprintable() and len(text) <= MAX_CHARS:
        return text
    kept = (
        " " if char.isspace() else char if unicodedata.category(char)[0] != "C" else "\ufffd"
        for char in text[:MAX_CHARS]
    )
    return "".join(kept)


def count(value: float) -> str:
    """A whole number with its thousands apart; of ten million and more the millions."""
    if abs(value) >= 1e15:
        return f"{value:.1e}"
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if abs(value) >= 10 * factor:
            return f"{value / factor:,.1f}{unit}"
    return f"{value:,.0f}"


def number(value: float) -> str:
    """A measured value with about four digits."""
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    return f"{value:,.{digits}f}" if abs(value) < 1000 else f"{value:,.0f}"


def short(value: float) -> str:
    """A pace, or another value that changes all the time, with about three digits."""
    if not math.isfinite(value):
        return str(value)
    return count(value) if abs(value) >= 1000 else f"{value:.3g}"


def counted(many: float, noun: str) -> str:
    """So many of something."""
    return f"{count(many)} {noun}" if many == 1 else f"{count(many)} {noun}s"


def duration(seconds: float) -> str:
    """A length of time in its two largest units."""
    if not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    first = next(index for index, (_, size) in enumerate(units) if whole >= size)
    (name, size), (next_name, next_size) = units[first], units[first + 1]
    rest = whole % size // next_size
    return f"{whole // size} {name} {rest} {next_name}" if rest else f"{whole // size} {name}"


def joined(parts: Sequence[Text | str | None], pen: Pen, style: str = "") -> Text:
    """What there is of the parts, with a dot between them, cut where the line ends."""
    line = Text(style=style)
    for part in parts:
        if part:
            line.append_text(Text(f" {pen.sign('·', '|')} ", DIM) if line else Text())
            line.append_text(part if isinstance(part, Text) else Text(part))
    return cut(line, pen)


def cut(line: Text, pen: Pen, width: int | None = None) -> Text:
    """The line, with an ellipsis where it is too long."""
    width = pen.width if width is None else width
    if line.cell_len > width:
        end = pen.sign("…", ".")[: max(width, 0)]
        line.truncate(max(width - len(end), 0))
        line.append(end)
    return line


def bar(share: float | None, width: int, pen: Pen, style: str = "cyan") -> Text:
    """A bar of which a share (0-1) is full; None draws nothing."""
    if share is None or share != share:
        return Text(" " * width)
    halves = round(min(max(share, 0.0), 1.0) * width * 2)
    full, half = divmod(halves, 2)
    drawn = Text().append(pen.sign("━", "#") * full + pen.sign("╸", "") * half, style)
    return drawn.append(pen.sign("─", "-") * (width - drawn.cell_len), DIM)


def sparkline(values: Sequence[float], width: int, pen: Pen, style: str = "cyan") -> Text:
    """A curve of the values, thinned to the width by means; a NaN among them is a cross."""
    if not values or width <= 0:
        return Text(" " * max(width, 0))
    levels = pen.sign(_LEVELS, _ASCII_LEVELS)
    cells = min(width, len(values))
    edges = [index * len(values) // cells for index in range(cells + 1)]
    means = [_finite_mean(values[start:end]) for start, end in itertools.pairwise(edges)]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    drawn = Text()
    for mean in means:
        if not math.isfinite(mean):
            drawn.append(pen.sign("×", "x"), BAD)
            continue
        share = (mean - low) / (high - low) if high > low else 0.0
        drawn.append(levels[min(int(share * len(levels)), len(levels) - 1)], style)
    return drawn.append(" " * (width - cells))


def _finite_mean(values: Sequence[float]) -> float:
    """The mean; NaN where one of them is no number."""
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan


@dataclasses.dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: above it.
        right: its cells end at the same place.
        drawn: least and greatest width, of one whose cells are drawn to the width that there is.
        shrinks_to: how narrow it may become before others are left out; of what is too long then
            the middle gives way, since names often differ at their end.
        keep: columns with the lowest number are left out first where there is no room for all,
            up to ``EXTRA`` before others are shrunk; those without one stay.
    """

    title: str | Text
    right: bool = False
    drawn: tuple[int, int] | None = None
    shrinks_to: int | None = None
    keep: int | None = None


Cell = Text | Callable[[int], Text]


def columns(
    layout: Sequence[Column], rows: Sequence[Sequence[Cell]], pen: Pen
) -> tuple[Text, list[Text]]:
    """Aligned columns: the line of titles, and one line for each row."""
    natural = [_natural(column, [row[n] for row in rows]) for n, column in enumerate(layout)]
    least = [
        wide if column.shrinks_to is None else min(wide, column.shrinks_to)
        for column, wide in zip(layout, natural, strict=True)
    ]
    # A column in which no row says anything is no column.
    shown = [
        n
        for n, column in enumerate(layout)
        if column.drawn or any(isinstance(row[n], Text) and row[n] for row in rows)
    ]

    def missing(widths: Sequence[int]) -> int:
        return sum(widths[n] for n in shown) + GAP * (len(shown) - 1) - pen.width

    for widths_wanted, most_kept in ((natural, EXTRA), (least, math.inf)):
        while missing(widths_wanted) > 0:
            kept = {n: keep for n in shown if (keep := layout[n].keep) is not None}
            if not kept or min(kept.values()) > most_kept:
                break
            shown.remove(min(kept, key=kept.__getitem__))
    widths, spare = dict.fromkeys(shown, 0), max(-missing(least), 0)
    for n in shown:
        widths[n] = min(natural[n], least[n] + spare) if not layout[n].drawn else least[n]
        spare -= widths[n] - least[n]
    elastic = [n for n in shown if layout[n].drawn]
    for left, n in enumerate(elastic):
        more = min(spare // (len(elastic) - left), (layout[n].drawn or (0, 0))[1] - widths[n])
        widths[n] += more
        spare -= more
    titles = [_title(layout[n].title) for n in shown]
    drawn = [[_drawn(layout[n], row[n], widths[n], pen) for n in shown] for row in rows]
    line, *lines = [
        _line(cells, [widths[n] for n in shown], [layout[n].right for n in shown], pen)
        for cells in [titles, *drawn]
    ]
    return line, lines


def _natural(column: Column, cells: Sequence[Cell]) -> int:
    if column.drawn:
        return column.drawn[0]
    texts = [cell for cell in cells if isinstance(cell, Text)]
    return max([_title(column.title).cell_len, *(text.cell_len for text in texts)])


def _title(title: str | Text) -> Text:
    return title.copy() if isinstance(title, Text) else Text(title, DIM)


def _drawn(column: Column, cell: Cell, width: int, pen: Pen) -> Text:
    if not isinstance(cell, Text):
        return cell(width)
    if column.shrinks_to is not None:
        return Text(middle_cut(cell.plain, width, pen), cell.style)
    return cell.copy()


def _line(cells: Sequence[Text], widths: Sequence[int], right: Sequence[bool], pen: Pen) -> Text:
    line = Text()
    for place, (cell, width, at_right) in enumerate(zip(cells, widths, right, strict=True)):
        cut(cell, pen, width)
        blank = " " * (width - cell.cell_len)
        line.append(" " * GAP if place else "")
        if at_right:
            line.append(blank).append_text(cell)
        else:
            line.append_text(cell).append(blank)
    line.rstrip()
    return cut(line, pen)


def at_ends(left: Text, right: Text, pen: Pen) -> Text:
    """One text at the line's beginning, one at its end; the first gives way."""
    room = max(pen.width - right.cell_len - GAP, 0)
    cut(left, pen, room)
    left.append(" " * (room + GAP - left.cell_len)).append_text(right)
    return cut(left, pen)


def middle_cut(text: str, width: int, pen: Pen) -> str:
    """A text whose middle gives way, since its end tells it from others: an address, a path."""
    text = plain(text)
    if cell_len(text) <= width:
        return text
    dots = pen.sign("…", "~")
    head = max((width - 1) // 2, 0)
    tail = max(width - 1 - head, 0)
    begins = range(len(text) + 1)
    begin = bisect.bisect_left(begins, True, key=lambda at: cell_len(text[at:]) <= tail)
    return set_cell_size(text, head).rstrip() + dots + text[begin:]
