"""What ``log_table`` takes, made plain: pandas, pyarrow, or a list of dicts.

Neither pandas nor pyarrow is imported: an object of theirs is known by its type's module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from raywb.rows import Cell
from raywb.values import Refusal, scalar

__all__ = ["PlainTable", "plain_table"]


class PlainTable(NamedTuple):
    """A table of plain values.

    Attributes:
        refused: for each column with values that had to be left out, the first one's type and why.
        refused_values: how many values that were, over all columns.
    """

    columns: list[str]
    rows: list[list[Cell]]
    refused: list[Refusal]
    refused_values: int


def plain_table(table: Any) -> PlainTable | Refusal:
    """The table as plain rows, or why not.

    A value that has no plain form is left out, and counted; missing values become None, dates
    their ISO text.
    """
    module = type(table).__module__.partition(".")[0]
    if module == "pandas" and hasattr(table, "itertuples"):
        columns = [str(name) for name in table.columns]
        rows: Iterable[Iterable[Any]] = table.itertuples(index=False, name=None)
    elif module == "pyarrow" and hasattr(table, "column_names"):
        columns = list(table.column_names)
        rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    elif isinstance(table, (list, tuple)) and all(isinstance(row, Mapping) for row in table):
        names = list(dict.fromkeys(name for row in table for name in row))
        columns = [str(name) for name in names]
        rows = ([row.get(name) for name in names] for row in table)
    else:
        name = f"{type(table).__module__}.{type(table).__qualname__}".removeprefix("builtins.")
        return Refusal("", name, "a table is a pandas or pyarrow table, or a list of dicts")
    return _plain_rows([column.encode("utf-8", "replace").decode() for column in columns], rows)


def _plain_rows(columns: list[str], rows: Iterable[Iterable[Any]]) -> PlainTable:
    taken: list[list[Cell]] = []
    refused: dict[str, Refusal] = {}
    count = 0
    for row in rows:
        cells: list[Cell] = []
        for column, value in zip(columns, row, strict=True):
            cell = _cell(value)
            if isinstance(cell, Refusal):
                refused.setdefault(column, Refusal(column, cell.type_name, cell.why))
                count += 1
                cell = None
            cells.append(cell)
        taken.append(cells)
    return PlainTable(columns, taken, list(refused.values()), count)


def _cell(value: Any) -> Cell | Refusal:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return None
    if callable(getattr(value, "isoformat", None)):
        return str(value.isoformat())
    return scalar(value)
