"""A small GraphQL executor: what is asked for, and only that, out of plain dictionaries.

    execute(document, variables, root) -> {"alias or name": value, …}

A *node* is a mapping of field names to values; a value that can be called is called with the
field's arguments, and may return nodes, lists of nodes or plain values. A field that a node lacks
is a `QueryError`, as on a real server, so a query of ours that asks for something that does not
exist fails here too. There is no schema and no introspection.

Covered is what clients send: variables with defaults, aliases, named and inline fragments,
`@include` and `@skip`, `__typename`.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

TOKEN = re.compile(
    r"""[\s,\ufeff]+ | \#[^\n]*                                            # passed over
    |(?P<string>\"\"\"(?:.|\n)*?\"\"\"|"(?:[^"\\]|\\.)*")
    |(?P<number>-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)
    |(?P<word>[A-Za-z_]\w*)
    |(?P<mark>\.\.\.|[{}()\[\]:$!=@|&])""",
    re.VERBOSE,
)
CONSTANTS: dict[str, Any] = {"true": True, "false": False, "null": None}


class QueryError(Exception):
    """Raised when a document cannot be read, or asks for what is not there."""


@dataclass(frozen=True)
class Variable:
    """A `$name` in the place of a value."""

    name: str


@dataclass(frozen=True)
class Selection:
    """One field, or one fragment (named by `fragment`, or with fields of its own)."""

    name: str = ""
    alias: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    directives: dict[str, dict[str, Any]] = field(default_factory=dict)
    fields: tuple[Selection, ...] = ()
    fragment: str = ""
    on_type: str = ""


@dataclass
class Document:
    """A parsed document that holds one operation."""

    kind: str = "query"
    name: str = ""
    defaults: dict[str, Any] = field(default_factory=dict)
    fields: tuple[Selection, ...] = ()
    fragments: dict[str, tuple[Selection, ...]] = field(default_factory=dict)


def execute(
    document: Document, variables: Mapping[str, Any] | None, root: Mapping[str, Any]
) -> dict[str, Any]:
    """Answer a document from the node `root`.

    Raises:
        QueryError: It asks for a field that is not there.
    """
    given = document.defaults | dict(variables or {})
    return _Execution(document, given).node(root, document.fields, document.name or document.kind)


def parse(text: str) -> Document:
    """Read a GraphQL document of one operation and its fragments.

    Raises:
        QueryError: It cannot be read.
    """
    return _Parser(text).document()


class _Execution:
    """One walk over a document, with its variables."""

    def __init__(self, document: Document, variables: Mapping[str, Any]) -> None:
        self._fragments = document.fragments
        self._variables = variables

    def node(
        self, node: Mapping[str, Any], fields: tuple[Selection, ...], path: str
    ) -> dict[str, Any]:
        answer: dict[str, Any] = {}
        for selection in self._flat(node, fields):
            key = selection.alias or selection.name
            if selection.name not in node:
                raise QueryError(f"Cannot query field {selection.name!r} of {path!r}")
            value = node[selection.name]
            if callable(value):
                value = self._call(value, selection, path)
            answer[key] = self._complete(value, selection.fields, f"{path}.{key}")
        return answer

    def _call(self, function: Callable[..., Any], selection: Selection, path: str) -> Any:
        given = {
            name: self._value(value)
            for name, value in selection.arguments.items()
            # A variable that was not given is an argument that was not given.
            if not isinstance(value, Variable) or value.name in self._variables
        }
        try:
            inspect.signature(function).bind(**given)
        except TypeError as error:
            raise QueryError(f"{path}.{selection.name}: {error}") from error
        return function(**given)

    def _complete(self, value: Any, fields: tuple[Selection, ...], path: str) -> Any:
        if isinstance(value, list):
            return [self._complete(item, fields, path) for item in value]
        if not fields or value is None:
            return value
        return self.node(value, fields, path)

    def _flat(self, node: Mapping[str, Any], fields: tuple[Selection, ...]) -> Iterator[Selection]:
        """The fields that apply to this node, fragments opened."""
        for selection in fields:
            if not self._wanted(selection):
                continue
            if selection.name:
                yield selection
                continue
            if selection.on_type and node.get("__typename", selection.on_type) != selection.on_type:
                continue
            if selection.fragment and selection.fragment not in self._fragments:
                raise QueryError(f"Unknown fragment {selection.fragment!r}")
            inner = self._fragments[selection.fragment] if selection.fragment else selection.fields
            yield from self._flat(node, inner)

    def _wanted(self, selection: Selection) -> bool:
        if not selection.directives:
            return True
        include = self._value(selection.directives.get("include", {})).get("if", True)
        skip = self._value(selection.directives.get("skip", {})).get("if", False)
        return bool(include) and not skip

    def _value(self, value: Any) -> Any:
        """A value with its variables filled in."""
        if isinstance(value, Variable):
            return self._variables.get(value.name)
        if isinstance(value, dict):
            return {key: self._value(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._value(item) for item in value]
        return value


class _Parser:
    """Recursive descent over the tokens of one document."""

    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str]] = []
        position = 0
        while position < len(text):
            match = TOKEN.match(text, position)
            if match is None:
                raise QueryError(f"Syntax error at {text[position : position + 20]!r}")
            if match.lastgroup is not None:
                self._tokens.append((match.lastgroup, match.group()))
            position = match.end()
        self._next = 0

    def document(self) -> Document:
        document = Document()
        while self._next < len(self._tokens):
            if self._skip("fragment"):
                name = self._word()
                self._expect("on")
                self._word()
                document.fragments[name] = self._selections()
            else:
                self._operation(document)
        return document

    def _operation(self, document: Document) -> None:
        if self._peek() != "{":
            document.kind = self._word()
        if self._peek() not in "{(":
            document.name = self._word()
        if self._skip("("):
            while not self._skip(")"):
                self._expect("$")
                name = self._word()
                self._expect(":")
                self._type()
                if self._skip("="):
                    document.defaults[name] = self._value()
        document.fields = self._selections()

    def _type(self) -> None:
        if self._skip("["):
            self._type()
            self._expect("]")
        else:
            self._word()
        self._skip("!")

    def _selections(self) -> tuple[Selection, ...]:
        self._expect("{")
        selections = []
        while not self._skip("}"):
            selections.append(self._fragment() if self._skip("...") else self._field())
        return tuple(selections)

    def _fragment(self) -> Selection:
        if self._peek() not in ("on", "{", "@"):
            return Selection(fragment=self._word(), directives=self._directives())
        on_type = self._word() if self._skip("on") else ""
        directives = self._directives()
        return Selection(on_type=on_type, directives=directives, fields=self._selections())

    def _field(self) -> Selection:
        name, alias = self._word(), ""
        if self._skip(":"):
            name, alias = self._word(), name
        arguments = self._arguments()
        directives = self._directives()
        fields = self._selections() if self._peek() == "{" else ()
        return Selection(name, alias, arguments, directives, fields)

    def _directives(self) -> dict[str, dict[str, Any]]:
        directives = {}
        while self._skip("@"):
            name = self._word()
            directives[name] = self._arguments()
        return directives

    def _arguments(self) -> dict[str, Any]:
        return self._pairs(")") if self._skip("(") else {}

    def _pairs(self, end: str) -> dict[str, Any]:
        pairs = {}
        while not self._skip(end):
            name = self._word()
            self._expect(":")
            pairs[name] = self._value()
        return pairs

    def _value(self) -> Any:
        if self._skip("$"):
            return Variable(self._word())
        if self._skip("{"):
            return self._pairs("}")
        if self._skip("["):
            items = []
            while not self._skip("]"):
                items.append(self._value())
            return items
        kind, text = self._take()
        if kind == "string":
            return text[3:-3] if text.startswith('"""') else json.loads(text)
        if kind == "number":
            return json.loads(text)
        if kind == "word":
            return CONSTANTS.get(text, text)  # another word is an enum's
        return self._fail("a value", text)

    def _peek(self) -> str:
        return self._tokens[self._next][1] if self._next < len(self._tokens) else ""

    def _take(self) -> tuple[str, str]:
        if self._next == len(self._tokens):
            self._fail("more", "the end")
        self._next += 1
        return self._tokens[self._next - 1]

    def _skip(self, text: str) -> bool:
        """Pass over the next token where it is this one, and say whether it was."""
        found = self._peek() == text
        self._next += found
        return found

    def _expect(self, text: str) -> None:
        if not self._skip(text):
            self._fail(repr(text), self._peek())

    def _word(self) -> str:
        kind, text = self._take()
        return text if kind == "word" else self._fail("a name", text)

    def _fail(self, wanted: str, found: str) -> NoReturn:
        raise QueryError(f"Syntax error: expected {wanted}, found {found!r}")
