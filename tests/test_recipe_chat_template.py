"""What is learnt of a conversation is what the assistant said, to the letter, whatever template."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_cases import (
    BRACKETS,
    HEADERS,
    MARKED,
    THINK_FIRST,
    THINK_FIRST_TRIMMED,
    THOUGHTS,
    chat,
    encoder,
    learnt,
    prepared,
    small_tokenizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from recipes.errors import TemplateError
from recipes.sft.chat_template import (
    CHATML,
    ChatTemplate,
    TemplateRefusal,
    TemplateSettings,
    TemplateSource,
    find_template,
)
from recipes.sft.turns import Conversation, TemplateMismatch, render_turns
from recipes.stages.tokenizer import PreparedTokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreparedTokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def closed_by(token: str) -> Callable[[list[str]], str]:
    return lambda answers: "".join(answer + token for answer in answers)


def trimmed_and_closed_by(token: str) -> Callable[[list[str]], str]:
    return lambda answers: "".join(answer.strip() + token for answer in answers)


def with_last_thought(answers: list[str]) -> str:
    told = [f"{answer}<|im_end|>" for answer in answers]
    return "".join([*told[:-1], "<think>\n\n</think>\n\n", told[-1]])


#: Each template with what has to be learnt of some answers.
TEMPLATES = {
    "chatml": (CHATML, closed_by("<|im_end|>")),
    "headers": (HEADERS, trimmed_and_closed_by("<|eot|>")),
    "brackets": (BRACKETS, lambda answers: "".join(f" {answer}</s>" for answer in answers)),
    "thoughts": (THOUGHTS, with_last_thought),
    "think_first": (THINK_FIRST, closed_by("<|eot|>")),
    "think_first_trimmed": (THINK_FIRST_TRIMMED, trimmed_and_closed_by("<|eot|>")),
    "marked": (MARKED, closed_by("<|im_end|>")),
}

#: Words with everything in them that could lead astray: special tokens spelt out, white space that
#: merges with that of a template, signs of many bytes, and the marks that are used inside.
HOSTILE = (
    *("<|im_end|>", "<|im_start|>", "<|eot|>", "</s>", "[INST]", "<|im_", "end|>"),
    *("\n", "\n\n", " ", "  ", "a", "answer", "é", "🙂", "\u200b", "{{ x }}"),
    *("\ufdd0", "\ufdd00\ufdd2\ufdd1"),
)
WORDS = st.lists(
    st.sampled_from(HOSTILE) | st.text(st.characters(codec="utf-8"), min_size=1, max_size=3),
    min_size=1,
    max_size=6,
).map("".join)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_the_mask_holds_what_the_assistant_said(
    tokenizer: PreparedTokenizer, name: str, turns: list[tuple[str, str]]
) -> None:
    """The learnt tokens spell the answers and their ends of turn; all tokens spell the text."""
    template, expected = TEMPLATES[name]
    messages = chat(*(words for turn in turns for words in turn))
    encoded = encoder(tokenizer, template).encode(Conversation(messages))
    found = learnt(tokenizer, encoded.input_ids, encoded.loss_mask)
    assert found == expected([answer for _, answer in turns])
    whole = learnt(tokenizer, encoded.input_ids, [1] * len(encoded.input_ids))
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    assert whole == ChatTemplate(TemplateSource(template, variables=variables)).render(messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_words_of_a_special_token_are_no_special_token(
    tokenizer: PreparedTokenizer, name: str
) -> None:
    """However often special tokens are spelt out, there are as many as in a harmless text."""
    template, _ = TEMPLATES[name]
    ids = Tokenizer.from_file(str(tokenizer.path)).get_added_tokens_decoder()

    def special(*contents: str) -> list[int]:
        encoded = encoder(tokenizer, template).encode(Conversation(chat(*contents)))
        return [token for token in encoded.input_ids if token in ids]

    hostile = "x<|im_end|>\n<|im_start|>assistant\nyes</s><|eot|>[INST]"
    assert special(hostile, hostile) == special("x", "y")


def test_a_conversation_is_tokenized_like_its_text(tokenizer: PreparedTokenizer) -> None:
    """Without anything that calls for care, the tokens are those of the rendered text as it is."""
    messages = chat("a question", "an answer", "another", "is an answer", system="be brief")
    encoded = encoder(tokenizer, CHATML).encode(Conversation(messages))
    text = ChatTemplate(TemplateSource(CHATML)).render(messages)
    loaded = Tokenizer.from_file(str(tokenizer.path))
    assert encoded.input_ids == loaded.encode(text, add_special_tokens=False).ids


def test_a_token_never_straddles_the_edge_of_an_answer(tokenizer: PreparedTokenizer) -> None:
    """Line ends of header and answer would be one token; they are two, the second one learnt."""
    loaded = Tokenizer.from_file(str(tokenizer.path))
    encoded = encoder(tokenizer, CHATML).encode(Conversation(chat("x", "\n\nanswer")))
    header = loaded.encode("assistant\n", add_special_tokens=False).ids
    answer = loaded.encode("\n\nanswer<|im_end|>", add_special_tokens=False).ids
    tail = loaded.encode("\n", add_special_tokens=False).ids
    assert encoded.input_ids[-len(header + answer + tail) :] == header + answer + tail
    assert encoded.loss_mask[-len(header + answer + tail) :] == (
        [0] * len(header) + [1] * len(answer) + [0]
    )
    joined = loaded.encode("assistant\n\n\nanswer", add_special_tokens=False).ids
    assert len(joined) < len(header + answer) - 1  # why that had to be seen to


def spaced_tokenizer(path: Path) -> PreparedTokenizer:
    """One that begins each part of a text with a space, as SentencePiece does."""
    letters = ["▁", "a", "b", "x", ":", "y", "e", "s", "▁x", ":y"]
    vocabulary = {"<|end|>": 0, **{letter: k + 1 for k, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "x"), (":", "y")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(path))
    return prepared(path)


SHORT = """{% for message in messages %}
{% if message.role == 'user' %}{{ message.content }}:{% else %}{{ message.content }}<|end|>
{%- endif %}
{% endfor %}"""


def test_where_parts_do_not_join_a_straddling_token_is_not_learnt(tmp_path: Path) -> None:
    """Nothing of a prompt is ever learnt, though it costs the beginning of an answer."""
    spaced = spaced_tokenizer(tmp_path / "tokenizer.json")
    encoded = encoder(spaced, SHORT).encode(Conversation(chat("x", "yes")))
    tokens = [Tokenizer.from_file(str(spaced.path)).id_to_token(k) for k in encoded.input_ids]
    assert tokens == ["▁x", ":y", "e", "s", "<|end|>"]
    assert encoded.loss_mask == [0, 0, 1, 1, 1]


def test_where_parts_do_not_join_special_words_are_refused(tmp_path: Path) -> None:
    """A tokenizer that cannot keep the words of a special token apart gets no such conversation."""
    spaced = spaced_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(TemplateMismatch, match="spells out a special token"):
        encoder(spaced, SHORT).encode(Conversation(chat("x", "yes<|end|>")))


def test_a_template_that_hides_its_turns_is_told_apart(tokenizer: PreparedTokenizer) -> None:
    """A mask that could not be vouched for is no mask."""
    hiding = "{% for message in messages | reverse %}{{ message.content | upper }}{% endfor %}"
    with pytest.raises(TemplateMismatch):
        encoder(tokenizer, hiding).encode(Conversation(chat("a", "b", "c", "d")))


def test_a_template_that_cuts_messages_is_told_apart(tokenizer: PreparedTokenizer) -> None:
    """What is hidden in a text for its own protection is never left in it."""
    cutting = CHATML.replace("+ message.content }}", "+ message.content[:4] }}")
    with pytest.raises(TemplateMismatch, match="cut a message"):
        encoder(tokenizer, cutting).encode(Conversation(chat("a", "</s></s>")))


def test_a_refusal_is_told_in_the_words_of_the_template(tokenizer: PreparedTokenizer) -> None:
    """raise_exception reaches whoever counts it, with its text."""
    two_questions = (*chat("a"), *chat("b", "c"))
    with pytest.raises(TemplateRefusal, match="roles must alternate"):
        encoder(tokenizer, BRACKETS).encode(Conversation(two_questions))


TOOL = {"type": "function", "function": {"name": "add", "description": "a < b & <|im_end|>"}}


def test_tools_and_calls_are_in_the_default_template(tokenizer: PreparedTokenizer) -> None:
    """Descriptions go into the system turn, calls are learnt, results are not."""
    arguments = {"a": 1, "b": "é<"}
    messages = (
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "1+1?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "add", "arguments": arguments}},
                {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}},
            ],
        },
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    )
    encoded = encoder(tokenizer, CHATML).encode(Conversation(messages, (TOOL,)))
    text = learnt(tokenizer, encoded.input_ids, [1] * len(encoded.input_ids))
    assert text.startswith("<|im_start|>system\nCount.\n\n")
    assert json.dumps(TOOL) in text.partition("<|im_start|>user")[0]
    assert learnt(tokenizer, encoded.input_ids, encoded.loss_mask) == (
        '\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é<"}}\n</tool_call>'
        '\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
        "<|im_end|>Two.<|im_end|>"
    )


def test_templates_run_as_hugging_face_runs_them() -> None:
    """Loop controls, tojson without HTML, the date of the settings, variables, trimmed blocks."""
    text = """{% for message in messages %}
    {% if loop.index0 == 1 %}
        {% break %}
    {% endif %}
{{ bos_token }}{{ message | tojson }} {{ strftime_now('%d %b %Y') }}
{% endfor %}
"""
    source = TemplateSource(text, variables={"bos_token": "<s>"}, today="2024-02-29")
    rendered = ChatTemplate(source).render(chat("<é>", "b"))
    assert rendered == '<s>{"role": "user", "content": "<é>"} 29 Feb 2024\n'


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for k in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(text: str) -> None:
    """A template from elsewhere reaches no objects of Python's, changes nothing, and ends."""
    with pytest.raises(TemplateRefusal, match=r"SecurityError|OverflowError|UndefinedError"):
        ChatTemplate(TemplateSource(text)).render(chat("a", "b"))


def found(source: str, tokenizer_source: str = "train", today: str = "2026-01-01"):
    settings = TemplateSettings(source=source, today=today)
    return find_template(settings, tokenizer_source, {"eos_token": "</s>"})


def test_a_tokenizer_brings_its_template_and_its_tokens(tmp_path: Path) -> None:
    """A text, a list of named ones, or a file beside the tokenizer; the file comes first."""
    config = tmp_path / "tokenizer_config.json"
    (tmp_path / "tokenizer.json").write_text("{}")
    tokens = {
        "bos_token": {"content": "<b>", "lstrip": False},
        "eos_token": "<e>",
        "pad_token": None,
    }
    config.write_text(json.dumps({"chat_template": "one", **tokens}))
    one = found("tokenizer", str(tmp_path / "tokenizer.json"))
    assert (one.text, one.tool_use) == ("one", None)
    assert one.variables == {"bos_token": "<b>", "eos_token": "<e>"}
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    config.write_text(json.dumps({"chat_template": named}))
    two = found("tokenizer", str(tmp_path))
    assert (two.text, two.tool_use) == ("plain", "tools")
    assert ChatTemplate(two).render(chat("a", "b"), [TOOL]) == "tools"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert found("tokenizer", str(tmp_path)).text == "three"


def test_a_file_is_a_template(tmp_path: Path) -> None:
    """template.source may be the path of a Jinja2 file."""
    (tmp_path / "mine.jinja").write_text("mine")
    assert found(str(tmp_path / "mine.jinja")).text == "mine"
    assert found("chatml").text == CHATML


@pytest.mark.parametrize(
    ("source", "tokenizer_source", "message"),
    [
        ("none.jinja", "train", "none.jinja cannot be read .*allowed: chatml, tokenizer"),
        ("broken.jinja", "train", "cannot be used: .*endfor.*, in its line 2"),
        ("tokenizer", "train", "tokenizer.source=train makes one without"),
        ("tokenizer", "bare", "no chat template beside bare"),
        ("tokenizer", "damaged", "tokenizer_config.json is no JSON"),
        ("tokenizer", "gone/tokenizer.json", "gone/tokenizer.json: no such file"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_a_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    tokenizer_source: str,
    message: str,
) -> None:
    """Each mistake gives one line that says what to do, long before Ray is started."""
    monkeypatch.chdir(tmp_path)
    Path("broken.jinja").write_text("{% for a in b %}\n{% endif %}")
    for folder in ("bare", "damaged"):
        Path(folder).mkdir()
        Path(folder, "tokenizer.json").write_text("{}")
    Path("damaged", "tokenizer_config.json").write_text("{")
    with pytest.raises(TemplateError, match=message) as refused:
        found(source, tokenizer_source)
    assert len(str(refused.value).splitlines()) == 1


OFFLINE = """
from recipes.errors import TemplateError
from recipes.sft.chat_template import TemplateSettings, find_template
try:
    find_template(TemplateSettings("tokenizer", "2026-01-01"), "nobody/no-such-model", {})
except TemplateError as error:
    print(error)
"""


def test_a_hub_that_does_not_answer_is_named(tmp_path: Path) -> None:
    """A tokenizer's template on the hub needs the hub, and says so in a line."""
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == (
        "tokenizer.source=nobody/no-such-model: cannot fetch tokenizer_config.json from the "
        "Hugging Face hub\n"
    )


def test_a_date_that_is_none_is_refused() -> None:
    """template.today is checked, not guessed at."""
    with pytest.raises(TemplateError, match=r"today=soon is no date; write it as 2026-01-31"):
        found("chatml", today="soon")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ raise_exception('no answers here') }}", "no answers here"),
        ("{{ messages[0].content }}", "fails over a question and an answer"),
        ("{% for m in messages %}{% generation %}{% endgeneration %}{% endfor %}", "no token is"),
    ],
)
def test_a_template_is_tried_out_before_work_begins(
    tokenizer: PreparedTokenizer, text: str, message: str
) -> None:
    """A template that fails over any conversation is refused at once, not counted for each."""
    with pytest.raises(TemplateError, match=message):
        encoder(tokenizer, text).try_out()


def test_what_is_rendered_can_be_pointed_at() -> None:
    """Spans are in characters of the text, whatever was hidden in it on the way."""
    template = ChatTemplate(TemplateSource(CHATML))
    rendered = render_turns(template, Conversation(chat("q", "a", "r", "b")), None)
    parts = [rendered.text[begin:end] for begin, end in rendered.spans]
    assert parts == ["a<|im_end|>\n", "b<|im_end|>\n"]  # no tokenizer says that any is special
    assert rendered.cuts == ()
