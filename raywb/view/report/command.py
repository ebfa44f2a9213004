"""``raywb report``: writes a run as one HTML file, and its charts as PNGs."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import click

from raywb.errors import DirectoryError, SettingsError
from raywb.view.report.contents import FEWEST_POINTS, Contents

__all__ = ["report"]

#: Most points of a series that anybody may ask for.
_MOST_POINTS_PER_SERIES = 20_000

#: Longest name of a file that this command chooses; with ``.html.part`` it stays below 255.
_NAME_BYTES = 200


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--output",
    metavar="FILE.html",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file; by default <run name>.html in the current directory. An earlier report is "
    "replaced, any other file is left alone.",
)
@click.option(
    "--png",
    "pictures",
    metavar="DIRECTORY",
    type=click.Path(path_type=Path, file_okay=False),
    help="Draw the charts as PNGs in this directory, too; takes raywb[report].",
)
@click.option(
    "--points",
    type=click.IntRange(FEWEST_POINTS, _MOST_POINTS_PER_SERIES),
    help="Most points of a series; by default 600, and fewer where there are very many series. "
    "What is between two points is kept as their range.",
)
def report(directory: Path, output: Path | None, pictures: Path | None, points: int | None) -> None:
    """Write a run as one HTML file that opens anywhere, without a network: the page of `raywb ui`.

    DIRECTORY is the run's: what start() printed as dir, of a run that is over or at work; or one
    that holds several, of which the newest is taken. No Ray is needed.
    """
    from raywb.view.report.contents import collect
    from raywb.view.report.read_directory import ReadDirectory

    found, others = _newest(directory.absolute())
    if others:
        click.echo(f"{found} is the newest of {others + 1} directories of runs", err=True)
    source = ReadDirectory(found)
    contents, notes = collect(source, points), source.notes()
    notes += _limits(contents)
    path = output or Path(f"{_plain(_name(contents))}.html")
    size_bytes = _write(path, contents, found, notes)
    click.echo(f"✓ {path} ({_size(size_bytes)}): {_in_words(contents)}")
    for note in notes:
        click.echo(f"! {note}", err=True)
    if pictures is not None:
        from raywb.view.report.pictures import draw_pictures

        drawn = draw_pictures(contents, pictures)
        total_bytes = sum(file.stat().st_size for file in drawn.files)
        click.echo(f"✓ {pictures} ({_size(total_bytes)}): {len(drawn.files)} PNGs")
        for what in drawn.left_out:
            click.echo(f"! without {what}", err=True)


def _newest(directory: Path) -> tuple[Path, int]:
    """Return the directory that is shown, and how many others there are.

    Raises:
        DirectoryError: there is none.
    """
    from raywb.view.page.sources import find_directories

    try:
        found = find_directories(directory)
    except OSError as error:
        raise DirectoryError(f"{directory} cannot be read: {error}") from error
    return found[0], len(found) - 1


def _limits(contents: Contents) -> list[str]:
    if not contents.left_out_series:
        return []
    return [f"{contents.left_out_series:,} series are left out: there are more than fit in a file."]


def _name(contents: Contents) -> str:
    """Of the run that is shown first."""
    number = contents.overview["run"]
    names = {run["number"]: str(run["name"]) for run in contents.overview["runs"]}
    return names.get(number) or next(iter(names.values()), "raywb")


def _plain(name: str) -> str:
    """A file's name, less its ending, that fits a file system: those count bytes."""
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.").encode()[:_NAME_BYTES]
    return plain.decode(errors="ignore") or "report"


def _in_words(contents: Contents) -> str:
    runs = len(contents.overview["runs"])
    points = f"at most {contents.points_per_series:,} points each"
    if not contents.thinned_series:
        points = "with all their points"
    counted = [
        f"{runs:,} run{'s' * (runs != 1)}",
        f"{contents.rows:,} rows",
        f"{contents.shown_series:,} series {points}",
    ]
    return ", ".join(counted)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.0f} kB"


def _write(path: Path, contents: Contents, directory: Path, notes: list[str]) -> int:
    """Write the file, whole or not at all; returns its size in bytes."""
    from raywb.view.report.document import is_report, make_document

    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    about = (
        f"Report of {_name(contents)}, written {written} from {directory}: {_in_words(contents)}"
    )
    text = make_document(
        contents.as_json(), title=f"{_name(contents)} · raywb", about=about, notes=notes
    )
    part = path.with_name(f".{path.name}.part")
    try:
        if path.exists() and not is_report(path):
            raise SettingsError(
                f"{path} is no report of raywb's, so it is left alone: name another file with "
                "--output, or remove it"
            )
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
        return path.stat().st_size
    except OSError as error:
        part.unlink(missing_ok=True)
        raise SettingsError(f"{path} cannot be written: {error}") from error
