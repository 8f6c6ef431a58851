"""What the tests on several hosts found, as tables; written to the file that HVDKIT_HOSTS_RESULTS names, if any."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

_tables: dict[str, dict[str, dict[str, str]]] = {}  # titles to rows to columns to cells


def note(table: str, row: str, column: str, cell: str) -> None:
    """Fill a cell; rows and columns are in the order of their first cells."""
    _tables.setdefault(table, {}).setdefault(row, {})[column] = cell


def write() -> None:
    """Write all tables, where the file is wanted and there is one."""
    wanted = os.environ.get("HVDKIT_HOSTS_RESULTS")
    if wanted and _tables:
        Path(wanted).write_text("\n\n".join(map(_markdown, _tables)) + "\n")


def _markdown(title: str) -> str:
    rows = _tables[title]
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(cells.get(column, "") for column in columns)] for row, cells in rows.items()]
    return "\n".join([f"{title}", "", *(_line(cells) for cells in lines)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
