"""The recipe as a user starts it: packs that hold every conversation once, with their masks."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import xxhash
import yaml
from ray_cluster import clean_environment
from tokenizers import Tokenizer
from wandb_file import read_runs

import recipes.pretrain
import recipes.sft
from recipes.errors import InputError, OutputError, SettingsError, TemplateError, TokenizerError
from recipes.settings import load_settings
from recipes.sft.data_prep import SftSettings, plan_data
from recipes.stages.layout import OutputLayout
from recipes.terminal import Terminal

FOLDER = Path(recipes.sft.__file__).parent
SPLITS = ("train", "valid", "test")
PACK_SIZE = 96

CONFIG = """
input: {{paths: ["{corpus}"], shard_bytes: 4_000, max_row_bytes: 20_000}}
tokenizer: {{vocab_size: 400, sample_bytes: 20_000}}
packing: {{pack_size: 96}}
split: {{train: 0.6, valid: 0.3, test: 0.1}}
workers: {{pack: 2}}
train: {{enabled: false}}
observability: {{pipeline_logging_interval_s: 1, pipeline_stats_jsonl_path: null}}
"""


@dataclass(frozen=True)
class Corpus:
    """Files with rows of every kind, and what has to become of them."""

    root: Path
    #: Of each conversation that is kept, the whole text and the answers with their ends of turn.
    expected: list[tuple[str, str]]
    rows_in: int
    filtered: dict[str, int]
    errors: dict[str, int]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Three JSONL files and a Parquet file, each JSONL with bad rows, and a README beside them."""
    root = tmp_path_factory.mktemp("corpus")
    conversations = []
    for k in range(120):
        turns = [("user", f"Question {k}?"), ("assistant", f"\n\nAnswer {k}: <|im_end|> yes.")]
        turns = turns * (1 + k % 2)
        if k % 3 == 0:
            turns.insert(0, ("system", "Be brief."))
        conversations.append([{"role": role, "content": content} for role, content in turns])
    bad = ['{"messages": ', '{"no": 1}', json.dumps({"messages": [conversations[1][0]]})]
    too_long = [*conversations[1], {"role": "assistant", "content": "and more of it " * 200}]
    for number in range(3):
        rows = [json.dumps({"messages": one}) for one in conversations[30 * number :][:30]]
        rows[5:5] = [*bad, json.dumps({"messages": too_long}), ""]
        (root / f"{number}.jsonl").write_text("\n".join(rows) + "\n")
    table = pa.Table.from_pylist([{"messages": one, "id": 1} for one in conversations[90:]])
    pq.write_table(table, root / "last.parquet")
    (root / "README.md").write_text("Not a conversation.")
    expected = [
        (
            "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages),
            "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"),
        )
        for messages in conversations
    ]
    return Corpus(
        root,
        expected,
        rows_in=120 + 15,
        filtered={"empty": 3, "too_long": 3},
        errors={"broken_json": 3, "no_assistant_turn": 3, "no_messages": 3},
    )


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """A home and a Ray directory of this module's own, with a path that is short enough."""
    root = Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))
    home = root / "home"
    home.mkdir()
    yield {**clean_environment(home), "RAY_TMPDIR": str(root), "TMPDIR": str(root)}
    shutil.rmtree(root, ignore_errors=True)


def start(env: dict[str, str], *words: object) -> str:
    """Run the recipe as a user does, and return what it printed; nothing of it is left."""
    with subprocess.Popen(
        [sys.executable, "-m", "recipes.sft", *map(str, words)],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        started = psutil.Process(process.pid)
        try:
            printed, _ = process.communicate(timeout=300)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for one in [*started.children(recursive=True), started]:
                    one.kill()
    assert process.returncode == 0, printed
    return printed


@dataclass(frozen=True)
class Made:
    """What a first start left, and what it printed."""

    config: Path
    output: Path
    printed: str
    contents: dict[str, bytes]


def contents(output: Path) -> dict[str, bytes]:
    """Everything that a training run would read."""
    names = ("blend.json", "tokenizer.json", "chat_template.jinja")
    files = [*(output / "shards").iterdir(), *(output / name for name in names)]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def made(
    corpus: Corpus, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Made:
    root = tmp_path_factory.mktemp("made")
    config, output = root / "recipe.yaml", root / "out"
    config.write_text(CONFIG.format(corpus=corpus.root))
    printed = start(environment, config, f"output_dir={output}")
    return Made(config, output, printed, contents(output))


def conversations(output: Path, split: str) -> list[tuple[str, str]]:
    """Text and learnt text of each conversation of a split, read and decoded from outside."""
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    found = []
    for path in sorted((output / "shards").glob(f"*.{split}.parquet")):
        for pack in pq.read_table(path).to_pylist():
            ids, mask, starts = pack["input_ids"], pack["loss_mask"], pack["seq_start_id"]
            assert 0 < len(ids) == len(mask) <= PACK_SIZE
            assert starts[0] == 0
            for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
                learnt = [ids[k] for k in range(begin, end) if mask[k]]
                found.append(
                    tuple(
                        tokenizer.decode(chosen, skip_special_tokens=False)
                        for chosen in (ids[begin:end], learnt)
                    )
                )
    return found


def on_xenna(test):
    """Mark a test that runs a pipeline, on a cluster that the recipe starts itself."""
    for mark in (pytest.mark.ray, pytest.mark.xenna, pytest.mark.timeout(400)):
        test = mark(test)
    return test


@on_xenna
def test_every_conversation_is_in_one_pack_with_its_mask(corpus: Corpus, made: Made) -> None:
    """Decoded, the packs are the conversations, and what is learnt are the answers."""
    by_split = {split: conversations(made.output, split) for split in SPLITS}
    found = Counter(one for split in by_split.values() for one in split)
    assert found == Counter(corpus.expected)
    assert all(len(by_split[split]) > 3 for split in SPLITS)
    assert len(by_split["train"]) > len(by_split["valid"]) > len(by_split["test"])


@on_xenna
def test_every_row_is_accounted_for(corpus: Corpus, made: Made) -> None:
    """Receipts, blend, summary and the W&B run tell the same numbers."""
    receipts = [json.loads(path.read_text()) for path in (made.output / "receipts").iterdir()]
    assert len(receipts) > 3
    assert sum(receipt["rows_in"] for receipt in receipts) == corpus.rows_in
    for field, expected in (("rows_filtered", corpus.filtered), ("rows_errors", corpus.errors)):
        counted: Counter[str] = Counter()
        for receipt in receipts:
            counted.update(receipt[field])
        assert counted == expected
    blend = json.loads((made.output / "blend.json").read_text())
    assert (blend["pack_size"], blend["tokenizer"]) == (PACK_SIZE, "tokenizer.json")
    packs = tokens = 0
    for split in SPLITS:
        part = blend["splits"][split]
        assert part["conversations"] == len(conversations(made.output, split))
        files = {f"shards/{path.name}" for path in made.output.glob(f"shards/*.{split}.parquet")}
        assert {shard["path"] for shard in part["shards"]} == files
        for shard in part["shards"]:
            path = made.output / shard["path"]
            lengths = [len(ids) for ids in pq.read_table(path)["input_ids"].to_pylist()]
            assert (shard["packs"], shard["tokens"]) == (len(lengths), sum(lengths))
            assert shard["xxh64"] == xxhash.xxh64_hexdigest(path.read_bytes())
        assert part["packs"] == sum(shard["packs"] for shard in part["shards"])
        assert part["tokens"] == sum(shard["tokens"] for shard in part["shards"])
        packs, tokens = packs + part["packs"], tokens + part["tokens"]
    efficiency = tokens / (packs * PACK_SIZE)
    assert blend["packing_efficiency"] == pytest.approx(efficiency)
    assert f"{packs:,} of {PACK_SIZE} tokens, {efficiency:.1%} filled" in made.printed
    assert "135 in = 120 kept + 6 filtered (empty 3, too_long 3) + 9 errors (" in made.printed
    assert "1 text files hold no conversations" in made.printed


@on_xenna
def test_the_run_knows_what_was_made(environment: dict[str, str], made: Made) -> None:
    """Totals and packing efficiency are in the W&B run, beside the pipeline's metrics."""
    (run,) = read_runs(Path(environment["HOME"])).values()
    blend = json.loads((made.output / "blend.json").read_text())
    summary = {
        key.removeprefix("sft/data_prep/"): value
        for key, value in run.summary.items()
        if key.startswith("sft/data_prep/")
    }
    assert (run.project, run.exit_code) == ("raywb-sft", 0)
    assert summary["packing_efficiency"] == pytest.approx(blend["packing_efficiency"])
    assert summary["rows_kept"] == 120
    assert summary["train/conversations"] == blend["splits"]["train"]["conversations"]
    assert run.summary["xenna/progress"] == 100
    assert "xenna/stage/packed_sft_parquet_stage/tasks_completed" in run.summary
    assert run.config["sft/data_prep"]["packing"]["pack_size"] == PACK_SIZE


@on_xenna
def test_a_second_start_makes_only_what_is_missing(environment: dict[str, str], made: Made) -> None:
    """A receipt and a file are gone, one worker instead of two: the same bytes are made."""
    receipts = sorted((made.output / "receipts").iterdir())
    receipts[0].unlink()
    damaged = made.output / "shards" / f"{receipts[1].stem}.train.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    kept = {path: path.stat().st_mtime_ns for path in receipts[2:]}
    words = ("workers.pack=1", "wandb.enabled=false")
    printed = start(environment, made.config, f"output_dir={made.output}", *words)
    assert f"{len(receipts)}: 2 made now, {len(receipts) - 2} already there" in printed
    assert contents(made.output) == made.contents
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


# --------------------------------------------------------------------------- before Ray is started


def planned(tmp_path: Path, *words: str):
    """Plan as the recipe does; returns the plan and what was said."""
    words = (f"output_dir={tmp_path / 'out'}", *words)
    settings = load_settings(SftSettings, FOLDER, "tiny", words)
    layout = OutputLayout(Path(settings.output_dir))
    layout.create()
    said = io.StringIO()
    try:
        return plan_data(settings, layout, Terminal(said, said)), said.getvalue()
    finally:
        assert not ray.is_initialized()


def json_lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return f"input.paths={path}"


GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def test_a_template_that_cannot_be_used_ends_before_ray(tmp_path: Path) -> None:
    """A missing or failing template is told before anything is started or written."""
    paths = json_lines(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(TemplateError, match=r"nowhere\.jinja cannot be read"):
        planned(tmp_path, paths, "template.source=nowhere.jinja")
    (tmp_path / "mute.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(TemplateError, match="fails over a question and an answer"):
        planned(tmp_path, paths, f"template.source={tmp_path / 'mute.jinja'}")


def test_input_without_conversations_ends_before_ray(tmp_path: Path) -> None:
    """A text is no conversation, and rows that are none train no tokenizer."""
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match=r"a\.txt is a text, and holds no conversations"):
        planned(tmp_path, f"input.paths={tmp_path / 'a.txt'}")
    with pytest.raises(TokenizerError, match=r"1 rows read, left out: \{'no_messages': 1\}"):
        planned(tmp_path, json_lines(tmp_path / "a.jsonl", {"text": "b"}))


def test_shares_must_leave_something(tmp_path: Path) -> None:
    """No split at all is a mistake."""
    with pytest.raises(SettingsError, match=r"must not all be 0"):
        planned(tmp_path, "split.train=0", "split.valid=0", "split.test=0")


def test_the_tokenizer_knows_the_tokens_of_the_template(tmp_path: Path) -> None:
    """Trained, it has them; loaded without them, it gets them behind its own vocabulary."""
    paths = json_lines(tmp_path / "a.jsonl", GOOD)
    plan, _ = planned(tmp_path / "1", paths)
    trained = Tokenizer.from_file(str(plan.dataset.tokenizer.path))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert [trained.token_to_id(token) for token in special] == [0, 1, 2]
    plain = json.loads(trained.to_str())
    plain["added_tokens"] = plain["added_tokens"][:1]
    for token in special[1:]:
        plain["model"]["vocab"].pop(token)
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    plan, _ = planned(tmp_path / "2", paths, f"tokenizer.source={tmp_path / 'plain.json'}")
    loaded = Tokenizer.from_file(str(plan.dataset.tokenizer.path))
    added = loaded.get_added_tokens_decoder()
    assert {added[loaded.token_to_id(token)].content for token in special} == set(special)
    assert all(token.special for token in added.values())
    assert plan.dataset.tokenizer.vocabulary_size == max(loaded.get_vocab().values()) + 1


def test_another_template_does_not_join_a_dataset(tmp_path: Path) -> None:
    """A template whose text has changed is another setting, though its name is the same."""
    path = tmp_path / "mine.jinja"
    words = (json_lines(tmp_path / "a.jsonl", GOOD), f"template.source={path}")
    mine = "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
    path.write_text(mine)
    plan, _ = planned(tmp_path, *words)
    assert plan.dataset.layout.chat_template.read_text() == mine
    plan.dataset.layout.receipt("shard-00000").write_text("{}")
    planned(tmp_path, *words)
    path.write_text(mine.replace(":", "="))
    with pytest.raises(OutputError, match=r"template\.fingerprint was"):
        planned(tmp_path, *words)


@pytest.mark.parametrize(
    ("word", "cause"),
    [
        ("template.today=2026-02-02", "template.source=chatml"),
        ("packing.seed=3", "packing.algorithm=first_fit_decreasing"),
    ],
)
def test_a_key_that_changes_nothing_is_refused(tmp_path: Path, word: str, cause: str) -> None:
    """Every key in the YAML changes behaviour, or says beside what it does not."""
    with pytest.raises(SettingsError, match=f"has no effect beside {cause}"):
        planned(tmp_path, word)


def test_both_recipes_have_their_keys_in_one_order() -> None:
    """A diff of the two folders shows what fine-tuning changes, and nothing else."""
    for name in ("default.yaml", "tiny.yaml"):
        mine = list(yaml.safe_load((FOLDER / name).read_text()))
        others = Path(recipes.pretrain.__file__).with_name(name)
        theirs = list(yaml.safe_load(others.read_text()))
        assert [key for key in mine if key in theirs] == [key for key in theirs if key in mine]
        assert set(mine) - set(theirs) <= {"template", "packing", "split"}
