"""Inputs in S3 and on web servers are the same input, and what a store refuses is one sentence."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from gcs_server import GcsServer, gcs_server
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
from recipe_inputs import (
    CORPUS_NAMES,
    corpus,
    input_settings,
    jsonl,
    lay_out,
    parquet,
    read_input,
    texts,
)
from web_server import WebServer, web_server

from recipes.errors import InputError
from recipes.stages import remote, web
from recipes.stages.scratch import Scratch
from recipes.stages.shards import cut_into_shards
from recipes.stages.sources import list_inputs

TESTS = Path(__file__).parent


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scratch:
    """Scratch space in the test's own directory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Scratch.of(tmp_path / "out", 10_004)


# ------------------------------------------------------------------------------------------ S3


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    """An S3 of moto's with the corpus in a bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """Credentials in the environment, and a file system to lay files out with."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3 = fsspec.get_filesystem_class("s3")
    s3.clear_instance_cache()
    file_system = fsspec.filesystem("s3", use_listings_cache=False)
    file_system.mkdir("bucket")
    yield file_system
    file_system.rm("bucket", recursive=True)
    s3.clear_instance_cache()


def test_s3_gives_the_same_documents_as_a_directory(
    tmp_path: Path, scratch: Scratch, s3: fsspec.AbstractFileSystem
) -> None:
    """A prefix of a bucket is the same input as the directory that was copied to it."""
    local = read_input(scratch, lay_out(tmp_path / "in", corpus()))
    for name, content in corpus().items():
        s3.pipe_file(f"bucket/some prefix/{name}", content)
    stored = read_input(scratch, "s3://bucket/some prefix/")
    assert stored.names == local.names == CORPUS_NAMES
    assert stored.the_same_rows_as(local)
    assert len(stored.shards) == len(local.shards)


def test_s3_has_globs_and_single_objects(s3: fsspec.AbstractFileSystem) -> None:
    """A glob matches in a bucket as it does in a directory, and an object may be named."""
    for name in ("a/part-1.jsonl", "a/part-2.jsonl", "a/other.jsonl", "b/part-1.jsonl", "b/x.bin"):
        s3.pipe_file(f"bucket/{name}", jsonl(["x"]))

    def names(*paths: str, **changes: object) -> list[str]:
        return [file.name for file in list_inputs(input_settings(*paths, **changes))]

    assert names("s3://bucket/a/part-*") == ["part-1.jsonl", "part-2.jsonl"]
    assert names("s3://bucket/*/part-1.jsonl") == ["a/part-1.jsonl", "b/part-1.jsonl"]
    assert names("s3://bucket/b/part-1.jsonl", "s3://bucket/b") == ["part-1.jsonl"]
    assert names("s3://bucket", exclude=("b/*",))[0] == "a/other.jsonl"
    with pytest.raises(InputError, match=r"nothing to read at s3://bucket/c$"):
        names("s3://bucket/c")
    with pytest.raises(InputError, match=r"nothing to read at s3://elsewhere/\*$"):
        names("s3://elsewhere/*")
    with pytest.raises(InputError, match=r"cannot tell how to read s3://bucket/b/x\.bin"):
        names("s3://bucket/b/x.bin")


def test_an_s3_object_that_changed_since_the_listing_is_refused(
    scratch: Scratch, s3: fsspec.AbstractFileSystem
) -> None:
    """The same number of other bytes is noticed, as is an object that is gone."""
    s3.pipe_file("bucket/a.txt", b"before")
    (shard,) = cut_into_shards(list_inputs(input_settings("s3://bucket/a.txt")), 100)
    scratch.fetch(shard)
    s3.pipe_file("bucket/a.txt", b"behind")
    with pytest.raises(InputError, match=r"s3://bucket/a\.txt changed since it was listed"):
        scratch.fetch(shard)
    s3.rm_file("bucket/a.txt")
    with pytest.raises(InputError, match=r"^cannot read s3://bucket/a\.txt: there is no such file"):
        scratch.fetch(shard)


def test_s3_without_credentials_is_one_sentence(
    s3: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the location and where S3's credentials may come from."""
    s3.pipe_file("bucket/a.txt", b"hello")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    type(s3).clear_instance_cache()
    with pytest.raises(InputError) as error:
        list_inputs(input_settings("s3://bucket/a.txt"))
    message = str(error.value)
    assert message.startswith("cannot list s3://bucket/a.txt: there are no credentials; set AWS_")
    assert "\n" not in message


def test_s3_that_refuses_is_one_sentence(
    s3_url: str, web_files: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused key is told apart from one that is missing."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", web_files.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "wrong")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    web_files.put("bucket/a.txt", b"", status=403)
    with pytest.raises(InputError) as error:
        list_inputs(input_settings("s3://bucket/a.txt"))
    message = str(error.value)
    assert message.startswith("cannot list s3://bucket/a.txt: access was refused")
    assert "AWS_PROFILE" in message


@pytest.mark.parametrize(
    ("location", "module", "extra"),
    [
        ("s3://bucket/key", "s3fs", "s3"),
        ("gs://bucket/key", "gcsfs", "gcs"),
        ("hf://datasets/org/name", "huggingface_hub", "hf"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    location: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who lacks a store's package is told what to install."""
    scheme = location.partition("://")[0]
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(InputError) as error:
        list_inputs(input_settings(location))
    assert str(error.value) == (
        f"reading {scheme}:// needs a package that is not installed: pip install 'raywb[{extra}]'"
    )


# ------------------------------------------------------------------------------------------ GCS


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsServer]:
    """A GCS whose address stands in the environment."""
    with gcs_server() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        kind = fsspec.get_filesystem_class("gs")
        kind.clear_instance_cache()
        yield server
        kind.clear_instance_cache()


def test_gcs_gives_the_same_documents_as_a_directory(
    tmp_path: Path, scratch: Scratch, gcs: GcsServer
) -> None:
    """A prefix of a bucket is the same input as the directory that was copied to it."""
    local = read_input(scratch, lay_out(tmp_path / "in", corpus()))
    gcs.objects |= {f"prefix/{name}": content for name, content in corpus().items()}
    stored = read_input(scratch, "gs://bucket/prefix")
    assert stored.names == local.names == CORPUS_NAMES
    assert stored.the_same_rows_as(local)
    assert read_input(scratch, "gs://bucket/*/e-*").names == ["prefix/e-text.txt"]
    assert read_input(scratch, "gs://bucket/prefix/e-text.txt").names == ["e-text.txt"]
    with pytest.raises(InputError, match=r"nothing to read at gs://bucket/other$"):
        list_inputs(input_settings("gs://bucket/other"))


def test_a_gcs_object_that_changed_or_is_refused_is_one_sentence(
    scratch: Scratch, gcs: GcsServer
) -> None:
    """Another generation is noticed; a refusal names what gives access."""
    gcs.objects["a.txt"] = b"before"
    (shard,) = cut_into_shards(list_inputs(input_settings("gs://bucket/a.txt")), 100)
    gcs.objects["a.txt"] = b"behind"
    with pytest.raises(InputError, match=r"gs://bucket/a\.txt changed since it was listed"):
        scratch.fetch(shard)
    gcs.refusal = 403
    with pytest.raises(InputError, match=r"^cannot list gs://bucket/a\.txt: access was refused"):
        list_inputs(input_settings("gs://bucket/a.txt"))


def test_what_fails_prints_no_traceback(tmp_path: Path, gcs: GcsServer) -> None:
    """A library that logs its own failures does not speak beside the one sentence."""
    gcs.refusal = 401
    code = (
        "from recipe_inputs import input_settings; from recipes.stages.sources import list_inputs\n"
        "from recipes.errors import InputError\n"
        "try: list_inputs(input_settings('gs://bucket/a.txt'))\n"
        "except InputError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.startswith("cannot list gs://bucket/a.txt: access was refused (401); run")


# ----------------------------------------------------------------------------------------- web


@pytest.fixture(scope="module")
def running_web() -> Iterator[WebServer]:
    """A web server for the module."""
    with web_server() as server:
        yield server


@pytest.fixture
def web_files(running_web: WebServer) -> WebServer:
    """The web server without any files."""
    running_web.files.clear()
    running_web.requests.clear()
    return running_web


@pytest.mark.parametrize(
    "behaviour",
    [{}, {"parts": False}, {"parts": False, "length": False}, {"etag": None}],
    ids=["parts", "whole", "unknown-size", "no-version"],
)
def test_the_web_gives_the_same_documents_as_a_directory(
    tmp_path: Path, scratch: Scratch, web_files: WebServer, behaviour: dict[str, object]
) -> None:
    """Files are the same input from every kind of web server, with parts or without."""
    root = lay_out(tmp_path / "in", corpus())
    local = read_input(scratch, *(root / name for name in CORPUS_NAMES))
    urls = [web_files.put(name, corpus()[name], **behaviour) for name in CORPUS_NAMES]
    stored = read_input(scratch, *urls)
    assert stored.the_same_rows_as(local)
    if behaviour.get("parts", True):
        assert len(stored.shards) == len(local.shards)


def test_of_a_large_file_a_slice_fetches_its_part(scratch: Scratch, web_files: WebServer) -> None:
    """Neither JSONL nor Parquet is read through for a slice in its middle."""
    rows = texts(40_000, 1)
    for name, content in (
        ("a.jsonl", jsonl(rows)),
        ("a.parquet", parquet(rows, row_group_size=4_000)),
    ):
        url = web_files.put(name, content)
        shards = cut_into_shards(list_inputs(input_settings(url)), len(content) // 10 + 1)
        assert len(shards) == 10
        web_files.sent_bytes = 0
        scratch.fetch(shards[5])
        assert web_files.sent_bytes < len(content) / 4


def test_an_empty_file_on_the_web_is_empty(scratch: Scratch, web_files: WebServer) -> None:
    """A file without a first byte is read as what it is."""
    found = read_input(scratch, web_files.put("a.jsonl", b""), web_files.put("b.txt", b""))
    assert (found.texts, found.counts.filtered) == ([], {"empty": 1})


def test_a_signed_address_is_no_glob_and_stays_secret(
    scratch: Scratch, web_files: WebServer
) -> None:
    """What stands behind the question mark goes to the server, and into no message."""
    url = web_files.put("a%20b.txt", b"hello")
    found = read_input(scratch, f"{url}?sig=SECRET")
    assert (found.names, found.texts) == (["a b.txt"], ["hello"])
    with pytest.raises(InputError, match=r"cannot read http.*/gone\.txt\?…: ") as error:
        read_input(scratch, f"{web_files.url}/gone.txt?sig=SECRET")
    assert "SECRET" not in str(error.value)
    with pytest.raises(InputError, match=r"comes with a login; put it into ~/\.netrc") as error:
        read_input(scratch, "https://somebody:SECRET@example.org/a.txt")
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, r"access was refused \(403\); use an address that may be read without a login"),
        (401, r"access was refused \(401\)"),
        (404, r"there is no such file$"),
        (418, r"418"),
    ],
)
def test_what_a_web_server_refuses_is_one_sentence(
    web_files: WebServer, status: int, message: str
) -> None:
    """The message names the address and says what the server answered."""
    url = web_files.put("a.txt", b"hello", status=status)
    with pytest.raises(InputError, match=rf"^cannot read {url}: .*{message}") as error:
        list_inputs(input_settings(url))
    assert "\n" not in str(error.value)


def test_a_web_server_cannot_be_listed(web_files: WebServer) -> None:
    """A folder or a glob on a web server is refused before it is asked."""
    for path in ("folder/", "part-*.jsonl"):
        with pytest.raises(InputError, match="a web server cannot be listed; name each file"):
            list_inputs(input_settings(f"{web_files.url}/{path}"))
    assert not web_files.requests


def test_a_silent_server_does_not_hang_the_recipe(
    web_files: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that takes the request and never answers is given up."""
    monkeypatch.setattr(remote, "SILENCE_S", 0.3)
    url = web_files.put("a.txt", b"hello", silent=True)
    with pytest.raises(InputError, match=rf"^cannot read {url}: no answer in time"):
        list_inputs(input_settings(url))


def test_a_server_that_is_not_there_is_one_sentence() -> None:
    """A port at which nobody listens is named."""
    with pytest.raises(InputError, match=r"^cannot read http://127\.0\.0\.1:1/a\.txt: .*127\.0\.0"):
        list_inputs(input_settings("http://127.0.0.1:1/a.txt"))


def test_a_lost_connection_is_tried_again(
    scratch: Scratch, web_files: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two connections that break off cost nothing; a server that always does is given up."""
    monkeypatch.setattr(web, "_PAUSES_S", (0.01, 0.01))
    content = jsonl(texts(50, 1))
    url = web_files.put("a.jsonl", content, hang_ups=2)
    assert read_input(scratch, url).texts == texts(50, 1)
    url = web_files.put("a.jsonl", content, hang_ups=100)
    with pytest.raises(InputError, match=rf"^cannot read {url}: "):
        read_input(scratch, url)


def test_a_web_file_that_changed_since_the_listing_is_refused(
    scratch: Scratch, web_files: WebServer
) -> None:
    """The server's version of a file is compared before its parts are fetched."""
    url = web_files.put("a.txt.gz", gzip.compress(b"hello"))
    (shard,) = cut_into_shards(list_inputs(input_settings(url)), 100)
    assert scratch.fetch(shard)[0].path.read_bytes() == b"hello"
    web_files.put("a.txt.gz", web_files.files["a.txt.gz"].content, etag="two")
    with pytest.raises(InputError, match=rf"{url} changed since it was listed"):
        scratch.fetch(shard)


# -------------------------------------------------------------------------------------- others


def test_any_store_that_fsspec_knows_is_a_store(tmp_path: Path, scratch: Scratch) -> None:
    """A scheme that is not named here works as well, such as memory:// and file://."""
    local = read_input(scratch, lay_out(tmp_path / "in", corpus()))
    memory = fsspec.filesystem("memory")
    for name, content in corpus().items():
        memory.pipe_file(f"/corpus/{name}", content)
    for location in ("memory://corpus", f"file://{tmp_path}/in"):
        stored = read_input(scratch, location)
        assert stored.names == local.names
        assert stored.the_same_rows_as(local)
    memory.rm("/corpus", recursive=True)
