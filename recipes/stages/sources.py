"""Where inputs come from: one small interface, so that a new kind of store touches nothing else.

    input.paths → Source.list() → InputFile …           the driver, once
    InputFile   → Source.open() → bytes                 a DownloadStage worker, per shard

A location is a file, a directory, a glob, or an address in a store:

    stdlib://[package]                    the source files of Python's standard library: the input
                                          that is real and on every machine
    stdlib-qa://[package]                 questions and answers about them     (``questions.py``)
    s3:// gs://                           objects, prefixes, globs            (``remote.py``)
    https:// http://                      single files                        (``web.py``)
    hf://[datasets/]ORG/NAME[@REVISION]   a dataset of the Hugging Face hub, or a path or a glob
                                          in it                               (``hub.py``)

and any other store that fsspec knows by its scheme.
"""

from __future__ import annotations

import fnmatch
import glob
import gzip
import io
import itertools
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, BinaryIO, Literal, Protocol

from recipes.errors import InputError
from recipes.settings import Count, NotEmpty, Text
from recipes.stages import questions
from recipes.stages.store_errors import shown

__all__ = [
    "Compression",
    "Format",
    "InputFile",
    "InputSettings",
    "Source",
    "list_inputs",
    "source_of",
]

Format = Literal["text", "jsonl", "parquet"]
#: How a file is packed as a whole; Parquet packs its pages itself.
Compression = Literal["gzip", "zstd"]

#: How a file is read, by its ending (before ``.gz`` or ``.zst``). A text is one document; a line of
#: JSONL and a row of Parquet are one.
_FORMAT_OF_SUFFIX: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
}
_COMPRESSION_OF_SUFFIX: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class InputSettings:
    """What is read, and what counts as one document."""

    paths: Annotated[tuple[str, ...], NotEmpty()]
    format: Literal["auto", "text", "jsonl", "parquet"]
    text_field: Text
    exclude: tuple[str, ...]
    limit_bytes: Count | None
    shard_bytes: Count
    max_document_bytes: Count


@dataclass(frozen=True)
class StoredFile:
    """A file as its store lists it."""

    #: What :meth:`Source.open` takes.
    url: str
    #: Relative to the location that was asked for, so the same on every machine.
    name: str
    #: None: the store does not say.
    size_bytes: int | None
    #: Another text whenever the content may be another: modification time, etag.
    version: str
    #: Whether the store hands out parts of it.
    divisible: bool = field(default=True, kw_only=True)


@dataclass(frozen=True)
class InputFile(StoredFile):
    """A stored file, and how it is to be read."""

    format: Format
    compression: Compression | None
    #: Of a Parquet file, the columns that are wanted.
    columns: tuple[str, ...] = field(default=(), kw_only=True)


class Source(Protocol):
    """A store of input files."""

    def list(self, location: str) -> Iterable[tuple[StoredFile, bool]]:
        """Yield the files at a location in any order, each with whether it was asked for by name.

        Files that were only found in a directory are skipped when their ending is unknown.
        """
        ...

    def stat(self, url: str) -> tuple[int | None, str]:
        """Return size, if it is known, and version of a file now."""
        ...

    def readable(self, url: str) -> bool:
        """Say whether this process may read a file, as far as that is known before opening it."""
        ...

    def open(self, url: str) -> BinaryIO:
        """Open a file for reading; where it is ``seekable()``, the reader can seek."""
        ...


class LocalSource:
    """Files, directories and globs that this node sees in its own file system."""

    #: Directories that are not walked into, beside hidden ones.
    _left_out: frozenset[str] = frozenset()

    def list(self, location: str) -> Iterator[tuple[StoredFile, bool]]:
        """Yield the files at a path or a glob; a directory is walked, hidden names left out."""
        pattern = Path(location).expanduser()
        matches = [str(pattern)] if pattern.exists() else glob.glob(str(pattern), recursive=True)
        root = _fixed_part(pattern) if not pattern.exists() else pattern
        for match in map(Path, matches):
            if match.is_dir():
                yield from ((file, False) for file in self._walk(match, root))
            elif match.is_file():
                name = match.name if match == root else match.relative_to(root).as_posix()
                yield self._stored(match, name), True

    def stat(self, url: str) -> tuple[int, str]:
        """Return size and modification time of a file now."""
        status = os.stat(url)
        return status.st_size, f"{status.st_mtime_ns:x}"

    def readable(self, url: str) -> bool:
        """Say whether this process has the permission to read a file."""
        return os.access(url, os.R_OK)

    def open(self, url: str) -> BinaryIO:
        """Open a file for reading."""
        return open(url, "rb")

    def _walk(self, top: Path, root: Path) -> Iterator[StoredFile]:
        for folder, subfolders, files in os.walk(top):
            subfolders[:] = [
                name
                for name in subfolders
                if not name.startswith(".") and name not in self._left_out
            ]
            for name in files:
                path = Path(folder, name)
                if not name.startswith(".") and path.is_file():
                    yield self._stored(path, path.relative_to(root).as_posix())

    def _stored(self, path: Path, name: str) -> StoredFile:
        size_bytes, version = self.stat(str(path))
        return StoredFile(str(path.absolute()), name, size_bytes, version)


class StandardLibrarySource(LocalSource):
    """The source files of the standard library of the Python that runs the recipe."""

    #: Not part of the library, or not its source.
    _left_out = frozenset({"site-packages", "dist-packages", "__pycache__"})

    def list(self, location: str) -> Iterator[tuple[StoredFile, bool]]:
        """Yield the library's ``.py`` files, or those of one package: ``stdlib://asyncio``."""
        root = Path(sysconfig.get_path("stdlib"), location.removeprefix("stdlib://"))
        yield from ((file, False) for file in self._walk(root, root) if file.name.endswith(".py"))


class QuestionSource(StandardLibrarySource):
    """Conversations about the standard library: of each module a JSONL file, made when it is read.

    A file is listed with the size of the module's source and as packed with gzip, so that it is
    handed out whole, and listing parses nothing.
    """

    _scheme = "stdlib-qa://"
    #: Beside what is no source of the library: its own tests, and what only serves as an example.
    _left_out = StandardLibrarySource._left_out | {"test", "tests", "idle_test", "turtledemo"}

    def list(self, location: str) -> Iterator[tuple[StoredFile, bool]]:
        """Yield a file for each public module, or for those of one package: ``stdlib-qa://json``."""
        top = Path(sysconfig.get_path("stdlib"))
        root = Path(top, location.removeprefix(self._scheme))
        found = self._walk(root, top) if root.is_dir() else iter(())
        if root.with_suffix(".py").is_file():
            name = root.with_suffix(".py").relative_to(top).as_posix()
            found = iter([self._stored(root.with_suffix(".py"), name)])
        for file in found:
            if file.name.endswith(".py") and not _is_private(file.name):
                url = f"{self._scheme}{file.name}"
                yield replace(file, url=url, name=f"{file.name}.jsonl.gz"), False

    def stat(self, url: str) -> tuple[int, str]:
        """Return the size of a module's source, and its version with that of the questions."""
        size_bytes, version = super().stat(self._path(url))
        return size_bytes, f"{version}-{questions.VERSION}"

    def readable(self, url: str) -> bool:
        """Say whether this process has the permission to read a module's source."""
        return super().readable(self._path(url))

    def open(self, url: str) -> BinaryIO:
        """Make the conversations about a module."""
        module = url.removeprefix(self._scheme).removesuffix(".py").removesuffix("/__init__")
        source = Path(self._path(url)).read_bytes()
        rows = questions.questions_about(source, module.replace("/", "."))
        return io.BytesIO(gzip.compress(rows, compresslevel=1, mtime=0))

    def _path(self, url: str) -> str:
        # An absolute path, as the walk through the library asks for it, stays as it is.
        return str(Path(sysconfig.get_path("stdlib"), url.removeprefix(self._scheme)))


def _is_private(name: str) -> bool:
    parts = PurePosixPath(name).with_suffix("").parts
    return any(part.startswith("_") and part != "__init__" for part in parts)


_SOURCES: dict[str, Source] = {
    "": LocalSource(),
    "stdlib": StandardLibrarySource(),
    "stdlib-qa": QuestionSource(),
}


def source_of(location: str) -> Source:
    """Return the store that a location or a file's url belongs to.

    Raises:
        InputError: There is no store for this scheme, or its package is not installed.
    """
    scheme = location.partition("://")[0] if "://" in location else ""
    if scheme not in _SOURCES:
        from recipes.stages.remote import remote_source

        _SOURCES[scheme] = remote_source(scheme, location)
    return _SOURCES[scheme]


def list_inputs(
    settings: InputSettings, columns: Sequence[str] | None = None
) -> tuple[InputFile, ...]:
    """List every input once, in an order that depends on nothing but the input and the settings.

    Args:
        settings: What is read.
        columns: What is wanted of a Parquet file; by default its ``text_field``.

    Raises:
        InputError: A location holds nothing, or a file cannot be read or has an unknown ending.
    """
    files: dict[str, InputFile] = {}
    for location in settings.paths:
        found = sorted(_list_location(location, settings), key=lambda file: file.name)
        if not found:
            raise InputError(f"input.paths: nothing to read at {shown(location)}")
        for file in found:
            wanted = (settings.text_field,) if columns is None else tuple(columns)
            wanted = wanted if file.format == "parquet" else ()
            files.setdefault(file.url, replace(file, columns=wanted))
    return tuple(files.values())


def _list_location(location: str, settings: InputSettings) -> Iterator[InputFile]:
    source = source_of(location)
    try:
        for stored, by_name in source.list(location):
            if _excluded(stored.name, settings.exclude):
                continue
            file = _with_format(stored, by_name, settings)
            if file is None:
                continue
            if not source.readable(file.url):
                raise InputError(f"input.paths: no permission to read {shown(file.url)}")
            yield file
    except OSError as error:
        raise InputError(
            f"input.paths: cannot list {shown(location)}: {error.strerror} ({error.filename})"
        ) from error


def _excluded(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _with_format(stored: StoredFile, by_name: bool, settings: InputSettings) -> InputFile | None:
    """Say how a file is read; None leaves out what lies in a directory with another ending."""
    name = PurePosixPath(stored.name.lower())
    compression = _COMPRESSION_OF_SUFFIX.get(name.suffix)
    suffix = name.with_suffix("").suffix if compression else name.suffix
    form = _FORMAT_OF_SUFFIX.get(suffix) if settings.format == "auto" else settings.format
    if form is None or (form == "parquet" and compression):
        if not by_name:
            return None
        raise InputError(
            f"input.paths: cannot tell how to read {shown(stored.url)}; known endings: "
            f"{', '.join(sorted(_FORMAT_OF_SUFFIX))}, all but .parquet also with "
            f"{' or '.join(_COMPRESSION_OF_SUFFIX)}; or set input.format=text, jsonl or parquet"
        )
    return InputFile(
        stored.url,
        stored.name,
        stored.size_bytes,
        stored.version,
        form,
        compression,
        divisible=stored.divisible,
    )


def _fixed_part(pattern: Path) -> Path:
    """Return the folder below which all matches of a glob lie."""
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts[:-1]))
    return Path(*fixed)
