"""The small GraphQL executor answers what is asked for, and refuses the rest."""

from __future__ import annotations

import pytest
from wandb_graphql import QueryError, execute, parse


def run_node(name: str, last: int | None = 1) -> dict[str, object]:
    return {"__typename": "Run", "name": name, "last": last, "numbers": [1, 2]}


ROOT = {"run": run_node}


def test_selection() -> None:
    """A field comes through aliases, fragments and conditions, and no other field does."""
    document = r"""
        # a comment
        query Named($name: String!, $all: Boolean = false, $last: Int) {
            mine: run(name: $name, last: $last) { ...Some  numbers @include(if: $all) }
            run(name: "a\"b", last: 2) { name ... on Run { last } ... on Other { nothing } }
        }
        fragment Some on Run { name, last }
    """
    parsed = parse(document)
    assert (parsed.kind, parsed.name) == ("query", "Named")
    assert execute(parsed, {"name": "x"}, ROOT) == {
        "mine": {"name": "x", "last": 1},  # a variable that is not given leaves the default
        "run": {"name": 'a"b', "last": 2},
    }
    given = execute(parsed, {"name": "x", "all": True, "last": None}, ROOT)
    assert given["mine"] == {"name": "x", "last": None, "numbers": [1, 2]}


@pytest.mark.parametrize(
    "document",
    [
        '{ run(name: "x") { colour } }',
        "{ run { name } }",
        '{ run(name: "x", colour: RED) { name } }',
        "{ walk }",
        '{ run(name: "x") { ...Missing } }',
        "{ run(",
        "{ ~ }",
    ],
)
def test_refusal(document: str) -> None:
    """What is not there, or cannot be read, is an error with a reason."""
    with pytest.raises(QueryError, match=r"\w"):
        execute(parse(document), {}, ROOT)
