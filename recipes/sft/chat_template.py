"""A chat template: Jinja2 that turns a conversation into the one text which a model reads.

    chatml       the one below: ``<|im_start|>role`` … ``<|im_end|>``, with tools in the system turn
    tokenizer    the one that lies beside the tokenizer, as Hugging Face stores it
    FILE         a file that holds one

Templates are run as Hugging Face's ``transformers`` runs them: sandboxed, with ``trim_blocks`` and
``lstrip_blocks``, loop controls, ``tojson`` that escapes no HTML, ``raise_exception``,
``strftime_now``, the tag ``{% generation %}``, and the tokenizer's special tokens as variables.
One thing differs on purpose: the clock stands at a date of the settings, so that the same input
gives the same bytes on any day.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from recipes.errors import TemplateError
from recipes.settings import Text

__all__ = [
    "CHATML",
    "ChatTemplate",
    "Message",
    "TemplateRefusal",
    "TemplateSettings",
    "TemplateSource",
    "find_template",
]

Message = Mapping[str, Any]

#: The default: a system turn if there is one, no words of its own unless there are tools.
CHATML = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- 'These functions can be called:\n<tools>\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\n' }}
    {%- endfor %}
    {{- '</tools>\nA call is a JSON object with "name" and "arguments", ' }}
    {{- 'between <tool_call> and </tool_call>.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\n' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {%- set given = function.arguments %}
            {{- '\n<tool_call>\n{"name": ' + function.name | tojson + ', "arguments": ' }}
            {{- given if given is string else given | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

#: Of several named templates: the one without tools, and the one that Hugging Face takes with them.
_DEFAULT, _TOOL_USE = "default", "tool_use"
_CONFIG, _OWN_FILE = "tokenizer_config.json", "chat_template.jinja"
_DATE = "%Y-%m-%d"
#: Around what a ``{% generation %}`` block gives; nothing unless :meth:`ChatTemplate.render` is
#: asked for marks.
_MARKS_VARIABLE = "generation_marks_of_the_recipe"
_NO_MARKS = ("", "")


@dataclass(frozen=True)
class TemplateSettings:
    """Which chat template, and which day it takes for today."""

    source: Text
    today: Text


@dataclass(frozen=True)
class TemplateSource:
    """Everything that a template needs, ready to be sent to a worker."""

    text: str
    #: For conversations with tools, where the tokenizer brings another one for them.
    tool_use: str | None = None
    #: What the template may name, such as ``bos_token``.
    variables: Mapping[str, str] = field(default_factory=dict)
    #: What ``strftime_now`` goes by, as ``2026-01-31``.
    today: str = "2026-01-01"


class TemplateRefusal(Exception):
    """Raised where a template has no text for a conversation, in the template's own words."""


class ChatTemplate:
    """A template that is ready to render.

    Raises:
        TemplateError: The template cannot be used; the message says where it is wrong.
    """

    def __init__(self, source: TemplateSource) -> None:
        self._source = source
        environment = _environment(source.today)
        self._default = _compiled(environment, source.text)
        self._tool_use = (
            self._default if source.tool_use is None else _compiled(environment, source.tool_use)
        )
        #: Whether the template says itself which of its text an assistant wrote.
        self.marks_turns = _GenerationTag.used_in(environment)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
        marks: tuple[str, str] = _NO_MARKS,
    ) -> str:
        """Return the text of a conversation.

        Args:
            messages: What was said: ``role``, ``content`` and whatever else the template knows.
            tools: Descriptions of functions, where there are any.
            add_generation_prompt: Go on to where the assistant would begin to write.
            marks: Put in front of and behind what ``{% generation %}`` blocks give.

        Raises:
            TemplateRefusal: The template refuses the conversation, or fails over it.
        """
        template = self._tool_use if tools else self._default
        try:
            return template.render(
                **self._source.variables,
                **{_MARKS_VARIABLE: marks},
                messages=messages,
                tools=tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is a program of the user's: anything may come
            raise TemplateRefusal(f"{type(error).__name__}: {error}") from error


def find_template(
    settings: TemplateSettings, tokenizer_source: str, variables: Mapping[str, str]
) -> TemplateSource:
    """Return the template that the settings ask for; it can be compiled.

    Args:
        settings: Which template.
        tokenizer_source: What ``tokenizer.source`` says: where a tokenizer's own template lies.
        variables: What the recipe knows of special tokens; a tokenizer's own come before them.

    Raises:
        TemplateError: There is none, or it cannot be used.
    """
    try:
        datetime.datetime.strptime(settings.today, _DATE)
    except ValueError as error:
        raise TemplateError(
            f"template.today={settings.today} is no date; write it as 2026-01-31"
        ) from error
    if settings.source == "chatml":  # it names no variables, and never asks for the date
        return TemplateSource(CHATML)
    own = functools.partial(_read_beside, tokenizer_source)
    known = dict(variables) if tokenizer_source == "train" else {**variables, **_special(own)}
    if settings.source == "tokenizer":
        found = _tokenizers_own(tokenizer_source, own)
    else:
        found = TemplateSource(_read_file(Path(settings.source).expanduser()))
    source = TemplateSource(found.text, found.tool_use, known, settings.today)
    ChatTemplate(source)
    return source


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(
            f"template.source={path} cannot be read ({getattr(error, 'strerror', None) or error}); "
            "allowed: chatml, tokenizer, the path of a Jinja2 file"
        ) from error


def _read_beside(tokenizer_source: str, name: str) -> str | None:
    """Return a file that lies beside a tokenizer.json, here or on the hub."""
    path = Path(tokenizer_source).expanduser()
    if path.exists():
        beside = (path if path.is_dir() else path.parent) / name
        return beside.read_text(encoding="utf-8") if beside.is_file() else None
    if tokenizer_source.endswith(".json"):
        raise TemplateError(f"tokenizer.source={tokenizer_source}: no such file")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
    from huggingface_hub.errors import LocalEntryNotFoundError as Offline

    try:
        return Path(hf_hub_download(tokenizer_source, name)).read_text(encoding="utf-8")
    except Offline as error:
        raise TemplateError(
            f"tokenizer.source={tokenizer_source}: cannot fetch {name} from the Hugging Face hub"
        ) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, ValueError, OSError) as error:
        raise TemplateError(
            f"tokenizer.source={tokenizer_source}: cannot fetch {name} from the Hugging Face hub: "
            f"{(str(error).splitlines() or [repr(error)])[0]}"
        ) from error


def _config(read: Callable[[str], str | None]) -> Mapping[str, Any]:
    try:
        content = json.loads(read(_CONFIG) or "{}")
    except ValueError as error:
        raise TemplateError(f"the tokenizer's {_CONFIG} is no JSON: {error}") from error
    return content if isinstance(content, Mapping) else {}


def _special(read: Callable[[str], str | None]) -> dict[str, str]:
    """Return a tokenizer's special tokens by their names, such as ``bos_token``."""
    found: dict[str, str] = {}
    for name, value in _config(read).items():
        token = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(token, str):
            found[name] = token
    return found


def _tokenizers_own(tokenizer_source: str, read: Callable[[str], str | None]) -> TemplateSource:
    if tokenizer_source == "train":
        raise TemplateError(
            "template.source=tokenizer needs a tokenizer that brings a template, and "
            "tokenizer.source=train makes one without; set tokenizer.source, or template.source"
        )
    own = read(_OWN_FILE)
    if own is not None:
        return TemplateSource(own)
    stored = _config(read).get("chat_template")
    if isinstance(stored, list):
        with contextlib.suppress(TypeError, KeyError):
            stored = {item["name"]: item["template"] for item in stored}
    if isinstance(stored, str):
        return TemplateSource(stored)
    if isinstance(stored, Mapping) and isinstance(stored.get(_DEFAULT), str):
        return TemplateSource(stored[_DEFAULT], stored.get(_TOOL_USE))
    raise TemplateError(
        f"template.source=tokenizer: there is no chat template beside {tokenizer_source}, neither "
        f"{_OWN_FILE} nor chat_template in {_CONFIG}; set template.source=chatml or a file"
    )


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` … ``{% endgeneration %}``: what an assistant wrote."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - jinja2 declares it like this

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.used = False

    @classmethod
    def used_in(cls, environment: jinja2.Environment) -> bool:
        """Say whether a template of this environment has the tag."""
        extension = environment.extensions[cls.identifier]
        return isinstance(extension, cls) and extension.used

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Make the block a call that puts marks around its text."""
        self.used = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        begin, end = context.get(_MARKS_VARIABLE, _NO_MARKS)
        return f"{begin}{caller()}{end}"


def _environment(today: str) -> jinja2.Environment:
    now = datetime.datetime.strptime(today, _DATE)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = now.strftime
    return environment


def _compiled(environment: jinja2.Environment, text: str) -> jinja2.Template:
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template cannot be used: {error.message}, in its line {error.lineno}"
        ) from error


def _tojson(
    value: Any,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Dump as JSON and leave every sign as it is; Jinja2's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
