"""Questions and answers about Python's standard library: conversations that are on every machine.

    a function or class with a docstring  →  one row ``{"messages": [...]}``

They are read off the source with ``ast``; nothing is imported and nothing is run. Which words a
question has, whether there is a system message, and whether a second question follows the first
are drawn from the name: the same source gives the same rows.
"""

from __future__ import annotations

import ast
import inspect
import json
import warnings
from collections.abc import Iterator

import xxhash

__all__ = ["VERSION", "questions_about"]

#: Changes when the same source begins to give other rows.
VERSION = 1

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Message = dict[str, str]

#: One of four conversations begins with the first of these.
_SYSTEM = (
    "You answer questions about Python's standard library.",
    "You explain Python to programmers, in the words of its own documentation.",
)
_WHAT = (
    "What does {name} do?",
    "What is {name} for?",
    "Explain {name} from Python's standard library.",
    "I came across {name} in Python. What is it?",
    "Please describe {name}.",
)
_CALL = (
    "How is {name} called?",
    "What is the signature of {name}?",
    "Which arguments does {name} take?",
)
_NEXT = ("And what does it do?", "What is it for?", "Please explain it, too.")
#: Docstrings shorter than this say nothing, and from longer ones only the first part is taken.
_SHORTEST, _LONGEST = 20, 1_500


def questions_about(source: bytes, module: str) -> bytes:
    """Return the conversations about a module, as JSONL; nothing where it cannot be parsed.

    Args:
        source: What is in its file.
        module: Its dotted name.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # old escapes in old docstrings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # files that are kept as bad examples
        return b""
    return b"".join(
        json.dumps({"messages": _conversation(*found)}, ensure_ascii=False).encode() + b"\n"
        for found in _documented(tree, module)
    )


def _documented(tree: ast.AST, prefix: str) -> Iterator[tuple[str, _Definition, str]]:
    """Yield every public definition that has a docstring, in the order of the source."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, _Definition) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        answer = _first_part(inspect.cleandoc(ast.get_docstring(node, clean=False) or ""))
        if len(answer) >= _SHORTEST:
            yield name, node, answer
        if isinstance(node, ast.ClassDef):
            yield from _documented(node, name)


def _first_part(text: str) -> str:
    """Return as many whole paragraphs as fit, and one at least."""
    while len(text) > _LONGEST and "\n\n" in text:
        text = text.rpartition("\n\n")[0]
    return text.strip()


def _conversation(name: str, definition: _Definition, answer: str) -> list[Message]:
    draw = xxhash.xxh3_64_intdigest(name.encode())

    def one_of(choices: tuple[str, ...], shift: int) -> str:
        return choices[(draw >> shift) % len(choices)].format(name=f"`{name}`")

    messages = []
    if draw % 4 == 0:
        messages.append(_message("system", one_of(_SYSTEM, 8)))
    if (draw >> 4) % 3 == 0 and not isinstance(definition, ast.ClassDef):
        messages += [
            _message("user", one_of(_CALL, 16)),
            _message("assistant", _signature(name, definition)),
            _message("user", one_of(_NEXT, 24)),
        ]
    else:
        messages.append(_message("user", one_of(_WHAT, 32)))
    return [*messages, _message("assistant", answer)]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _signature(name: str, definition: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    returned = f" -> {ast.unparse(definition.returns)}" if definition.returns else ""
    return f"`{name}({ast.unparse(definition.args)}){returned}`"
