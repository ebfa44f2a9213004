"""The recipe as a user starts it: the same bytes every time, and a kill costs no finished work."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from ray_cluster import clean_environment, until
from tokenizers import Tokenizer

from recipes.local_ray import XENNA_ENVIRONMENT

pytestmark = [pytest.mark.ray, pytest.mark.xenna, pytest.mark.timeout(400)]

FILES, ROWS_PER_FILE = 40, 12

CONFIG = """
input: {{paths: ["{corpus}"], shard_bytes: 2_500, max_document_bytes: 2_000}}
tokenizer: {{vocab_size: 400, sample_bytes: 20_000}}
workers: {{tokenize: 1}}
train: {{enabled: false}}
observability: {{pipeline_logging_interval_s: 1, pipeline_stats_jsonl_path: null}}
wandb: {{enabled: false}}
"""

#: A cluster that the recipe finds rather than starts; it lives until its input is closed.
CLUSTER = """
import sys, ray
started = ray.init(address="local", num_cpus=8, include_dashboard=True, log_to_driver=False)
print(started.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Corpus:
    """Files with rows of every kind, and what has to become of them."""

    root: Path
    texts: list[str]
    rows_in: int
    filtered: dict[str, int]
    errors: dict[str, int]


@dataclass(frozen=True)
class Outcome:
    """How a recipe ended, and what it showed."""

    exit_code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Forty JSONL files, every other one packed, and a text file; each JSONL with bad rows."""
    root = tmp_path_factory.mktemp("corpus")
    texts = []
    for number in range(FILES):
        rows = []
        for k in range(ROWS_PER_FILE):
            texts.append(f"Row {k} of file {number}: <|endoftext|> " + "words and more " * (k % 5))
            rows.append(json.dumps({"text": texts[-1]}).encode())
        rows[3:3] = [b"", b'{"text": ', b'{"no": 1}', b'{"text": "\xff"}']
        rows[9:9] = [json.dumps({"text": "long " * 500}).encode()]
        content = b"\n".join(rows) + b"\n"
        if number % 2:
            (root / f"{number:02d}.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
        else:
            (root / f"{number:02d}.jsonl").write_bytes(content)
    (root / "last.txt").write_text("A text is one document.\n")
    texts.append("A text is one document.\n")
    errors = {"broken_json": FILES, "missing_text": FILES, "undecodable": FILES}
    return Corpus(
        root,
        texts,
        rows_in=len(texts) + 5 * FILES,
        filtered={"empty": FILES, "too_long": FILES},
        errors=errors,
    )


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """A home and a Ray directory of this module's own, with a path that is short enough."""
    root = Path(tempfile.mkdtemp(prefix="rp", dir="/tmp"))
    home = root / "home"
    home.mkdir()
    yield {**clean_environment(home), "RAY_TMPDIR": str(root), "TMPDIR": str(root)}
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """The environment of a process that finds a running cluster."""
    ours = environment | XENNA_ENVIRONMENT
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env=ours,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        yield ours | {"RAY_ADDRESS": address, "CLUSTER_PID": str(process.pid)}
        started = psutil.Process(process.pid).children(recursive=True)
        process.communicate(timeout=60)
        end(started)


@pytest.fixture
def config(corpus: Corpus, tmp_path: Path) -> Path:
    """A configuration file for the corpus."""
    path = tmp_path / "recipe.yaml"
    path.write_text(CONFIG.format(corpus=corpus.root))
    return path


@contextlib.contextmanager
def recipe(words: Sequence[object], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Start the recipe as a user does; on leaving, nothing of it is left."""
    with subprocess.Popen(
        [sys.executable, "-m", "recipes.pretrain", *map(str, words)],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        started = psutil.Process(process.pid)
        try:
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                end([*started.children(recursive=True), started])


def end(processes: Sequence[psutil.Process]) -> None:
    """End processes; xenna's actors do not notice that their cluster was killed."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def run(*words: object, env: dict[str, str]) -> Outcome:
    with recipe(words, env) as process:
        out, err = process.communicate(timeout=300)
        return Outcome(process.returncode, out, err)


def orphans(home: str) -> list[psutil.Process]:
    """Ray's processes that outlived whoever started them, told from others by their HOME."""
    found = []
    for process in psutil.process_iter(["ppid", "cmdline"]):
        with contextlib.suppress(psutil.NoSuchProcess):
            of_ray = " ".join(process.info["cmdline"] or ()).startswith("ray::")
            if of_ray and process.info["ppid"] == 1 and process.environ().get("HOME") == home:
                found.append(process)
    return found


def finished(output: Path) -> int:
    return len(list((output / "receipts").glob("*.json")))


def stop_in_the_middle(
    config: Path, output: Path, env: dict[str, str], number: signal.Signals
) -> Outcome:
    """Start the recipe, and send it a signal when its first shard is finished."""
    with recipe([config, f"output_dir={output}"], env) as process:
        children = psutil.Process(process.pid).children

        def first_shard() -> bool:
            assert process.poll() is None, process.communicate()
            return finished(output) > 0

        until("the first shard", first_shard)
        started = children(recursive=True)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        end(started if "RAY_ADDRESS" not in env else [])
        return Outcome(process.returncode, out, err)


def contents(output: Path) -> dict[str, bytes]:
    """Everything that a training run would read."""
    files = [*(output / "shards").iterdir(), output / "blend.json", output / "tokenizer.json"]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def documents(output: Path) -> list[str]:
    """The texts of all shards in order, read by the format's description and decoded."""
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    eod_id = tokenizer.token_to_id("<|endoftext|>")
    found = []
    for path in sorted((output / "shards").glob("*.bin")):
        ids = np.fromfile(path, dtype="<u2")
        parts = np.split(ids, np.flatnonzero(ids == eod_id) + 1)[:-1]
        found += tokenizer.decode_batch(
            [part[:-1].tolist() for part in parts], skip_special_tokens=False
        )
    return found


@pytest.fixture(scope="module")
def reference(
    corpus: Corpus, cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Outcome]:
    """The output of one run on a cluster with a single tokenizing worker."""
    root = tmp_path_factory.mktemp("reference")
    (root / "recipe.yaml").write_text(CONFIG.format(corpus=corpus.root))
    output = root / "out"
    return output, run(root / "recipe.yaml", f"output_dir={output}", env=cluster)


def test_every_row_is_a_document_or_counted(
    corpus: Corpus, reference: tuple[Path, Outcome]
) -> None:
    """The shards hold the good rows, in order and to the letter; the others are in the receipts."""
    output, outcome = reference
    assert outcome.exit_code == 0, outcome
    assert documents(output) == corpus.texts
    receipts = [json.loads(path.read_text()) for path in (output / "receipts").iterdir()]
    assert sum(receipt["rows_in"] for receipt in receipts) == corpus.rows_in
    for field, expected in (("rows_filtered", corpus.filtered), ("rows_errors", corpus.errors)):
        kinds = {kind for receipt in receipts for kind in receipt[field]}
        found = {kind: sum(receipt[field].get(kind, 0) for receipt in receipts) for kind in kinds}
        assert found == expected
    blend = json.loads((output / "blend.json").read_text())
    sizes = {path.stem: path.stat().st_size // 2 for path in (output / "shards").glob("*.bin")}
    weights = zip(blend["blend"][::2], blend["blend"][1::2], strict=True)
    assert {Path(prefix).name: int(weight) for weight, prefix in weights} == sizes


def test_the_summary_tells_a_person_what_was_done(
    corpus: Corpus, reference: tuple[Path, Outcome]
) -> None:
    """Counts, places and nothing else on standard output; no noise of Ray or xenna anywhere."""
    output, outcome = reference
    made = finished(output)
    assert f"{corpus.rows_in:,} in = {len(corpus.texts):,} kept + 80 filtered (empty 40, " in (
        outcome.out
    )
    assert f"{made}: {made} made now, 0 already there" in outcome.out
    assert str(output / "blend.json") in outcome.out
    assert outcome.err.splitlines()[0].startswith("Listing ")
    assert not any(word in outcome.out + outcome.err for word in ("INFO", "Traceback", "\x1b"))
    assert "Pipeline stats" in (output / "logs" / "recipe.log").read_text()


def test_nothing_of_a_recipe_stays_on_a_cluster_that_goes_on(
    reference: tuple[Path, Outcome], cluster: dict[str, str]
) -> None:
    """After a recipe, a cluster has neither xenna's processes nor the recipe's scratch files."""
    raylet = psutil.Process(int(cluster["CLUSTER_PID"]))

    def left_over() -> list[str]:
        found = []
        for process in raylet.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(" ".join(process.cmdline()))
        return [line for line in found if "StageWorker" in line or "NodeResource" in line]

    until("xenna's processes to end", lambda: not left_over())
    assert not list(Path(cluster["TMPDIR"]).glob("raywb-recipes-*/*"))


#: A job whose detached actors have the names of xenna's, and are in the middle of a call.
AT_WORK = """
import os, time
import psutil, ray
from recipes.cluster import RaySettings, ray_cluster

class Busy:
    def pid(self):
        return os.getpid()

    def work(self):
        time.sleep(600)

with ray_cluster(RaySettings(num_cpus=None, log_to_driver=False)):
    pids = []
    for name in ("NodeResourceMonitor", "StageWorker"):
        actor = ray.remote(num_cpus=0)(type(name, (Busy,), {}))
        actor = actor.options(name=name, namespace="test", lifetime="detached").remote()
        pids.append(ray.get(actor.pid.remote()))
        actor.work.remote()
    while not all(".work" in psutil.Process(pid).cmdline()[0] for pid in pids):
        time.sleep(0.05)
    print("pids:", *pids, flush=True)
"""


def test_actors_at_work_are_ended_too(cluster: dict[str, str]) -> None:
    """A process whose title names the method that it is in belongs to xenna all the same.

    The actors are detached, so that Ray itself does not end them with the job.
    """
    job = subprocess.run(
        [sys.executable, "-c", AT_WORK], env=cluster, capture_output=True, text=True, timeout=120
    )
    assert job.returncode == 0, job.stderr
    said = re.search(r"^pids: (\d+) (\d+)$", job.stdout, re.MULTILINE)
    assert said, job.stdout
    pids = [int(pid) for pid in said.groups()]
    until("both processes to end", lambda: not any(map(psutil.pid_exists, pids)))


def test_any_number_of_workers_gives_the_same_bytes(
    config: Path, reference: tuple[Path, Outcome], cluster: dict[str, str], tmp_path: Path
) -> None:
    """Three workers write byte for byte what one wrote; a second start writes nothing."""
    output = tmp_path / "out"
    words = (config, f"output_dir={output}", "workers.tokenize=3", "workers.download=2")
    assert run(*words, env=cluster).exit_code == 0
    assert contents(output) == contents(reference[0])
    written = {path: path.stat().st_mtime_ns for path in (output / "shards").iterdir()}
    again = run(*words, env=cluster)
    assert f"{finished(output)}: 0 made now, {finished(output)} already there" in again.out
    assert {path: path.stat().st_mtime_ns for path in (output / "shards").iterdir()} == written
    assert contents(output) == contents(reference[0])


def test_a_dataset_is_replaced_only_on_demand(
    config: Path, reference: tuple[Path, Outcome], cluster: dict[str, str], tmp_path: Path
) -> None:
    """Other settings are refused; with overwrite=true they make all shards anew, old ones go."""
    output = tmp_path / "out"
    shutil.copytree(reference[0], output)
    words = (config, f"output_dir={output}", "input.shard_bytes=5_000")
    refused = run(*words, env=cluster)
    assert refused.exit_code == 1
    assert "input.shard_bytes was 2500, now 5000" in refused.err
    assert contents(output) == contents(reference[0])
    replaced = run(*words, "overwrite=true", env=cluster)
    made, before = finished(output), finished(reference[0])
    assert f"{made}: {made} made now, 0 already there, {before - made} outdated" in replaced.out
    assert documents(output) == documents(reference[0])


def test_a_start_after_a_kill_makes_only_what_is_missing(
    config: Path, reference: tuple[Path, Outcome], environment: dict[str, str], tmp_path: Path
) -> None:
    """After SIGKILL no blend is there, finished shards stay, damaged and missing ones are made."""
    output = tmp_path / "out"
    stop_in_the_middle(config, output, environment, signal.SIGKILL)
    total, before = finished(reference[0]), finished(output)
    assert 0 < before < total
    assert not (output / "blend.json").exists()
    receipts = sorted((output / "receipts").glob("*.json"))
    kept = {path: path.stat().st_mtime_ns for path in receipts[1:]}
    damaged = output / "shards" / f"{receipts[0].stem}.bin"
    damaged.write_bytes(damaged.read_bytes()[:-2])
    (output / "shards" / "shard-00039.bin.tmp-1-aa").write_bytes(b"half")
    outcome = run(config, f"output_dir={output}", env=environment)
    assert f"{total}: {total - before + 1} made now, {before - 1} already there" in outcome.out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(output) == contents(reference[0])
    assert orphans(environment["HOME"]) == []


def test_ctrl_c_ends_in_order_and_the_next_start_goes_on(
    config: Path, reference: tuple[Path, Outcome], cluster: dict[str, str], tmp_path: Path
) -> None:
    """Ctrl-C: exit code 130, the command that goes on, and that command goes on."""
    output = tmp_path / "out"
    outcome = stop_in_the_middle(config, output, cluster, signal.SIGINT)
    assert outcome.exit_code == 130, outcome
    assert f"python -m recipes.pretrain {config} output_dir={output}" in outcome.err
    assert "Traceback" not in outcome.err
    before = finished(output)
    again = run(config, f"output_dir={output}", env=cluster)
    assert f"{before} already there" in again.out
    assert contents(output) == contents(reference[0])


def test_a_stage_that_fails_ends_the_recipe_with_its_reason(
    config: Path, reference: tuple[Path, Outcome], cluster: dict[str, str], tmp_path: Path
) -> None:
    """What went wrong in a worker is told in one sentence, and the exit code is not 0."""
    (tmp_path / "in").mkdir()
    # another file in every process that opens it, so never the one that was listed
    (tmp_path / "in" / "changing.txt").symlink_to("/proc/self/environ")
    outcome = run(
        config,
        f"output_dir={tmp_path / 'out'}",
        f"input.paths={tmp_path / 'in'}",
        f"tokenizer.source={reference[0] / 'tokenizer.json'}",
        env=cluster,
    )
    assert outcome.exit_code == 1
    failure = next(line for line in outcome.err.splitlines() if line.startswith("Failed: "))
    assert failure.endswith("changing.txt changed since it was listed; start again")
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out" / "blend.json").exists()


def test_settings_of_a_cluster_are_refused_where_there_is_one(
    config: Path, cluster: dict[str, str], tmp_path: Path
) -> None:
    """ray.num_cpus cannot change a running cluster, and says so."""
    outcome = run(config, f"output_dir={tmp_path / 'out'}", "ray.num_cpus=4", env=cluster)
    assert outcome.exit_code == 1
    assert "ray.num_cpus has no effect here, because there is a Ray cluster" in outcome.err


def test_a_wrong_setting_costs_nothing(config: Path, environment: dict[str, str]) -> None:
    """A typing error is refused with exit code 2, in one line, before anything is written."""
    outcome = run(config, "input.shardbytes=5", env=environment | {"PYTHONWARNINGS": "ignore"})
    assert outcome.exit_code == 2
    assert outcome.err == (
        "unknown key 'input.shardbytes' on the command line; did you mean 'input.shard_bytes'?\n"
    )
    assert not os.path.exists("data/pretrain")


def test_help_is_there_at_once(environment: dict[str, str]) -> None:
    """--help shows how to start the recipe, and every key with its default."""
    outcome = run("--help", env=environment)
    assert outcome.exit_code == 0
    assert "python -m recipes.pretrain tiny" in outcome.out
    assert "shard_bytes: 500_000" in outcome.out
