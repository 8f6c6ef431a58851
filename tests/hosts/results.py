"""What the tests on several hosts found, as tables.

HVDKIT_HOSTS_RESULTS names the file for them, or is "-" for the terminal. `make test-hosts` names the file only where
all of them are to run, so that a part never takes the place of the whole.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

WANTED = "HVDKIT_HOSTS_RESULTS"
TERMINAL = "-"
_tables: dict[str, dict[str, dict[str, str]]] = {}  # titles to rows to columns to cells


def note(table: str, row: str, column: str, cell: str) -> None:
    """Fill a cell; rows and columns are in the order of their first cells."""
    _tables.setdefault(table, {}).setdefault(row, {})[column] = cell


def write(wanted: str) -> str:
    """Write all tables, where there is one, to the file that is wanted; what is for the terminal is returned."""
    text = "\n\n".join(map(_markdown, _tables))
    if wanted == TERMINAL or not _tables:
        return text
    head = f"Written by `make test-hosts` on {os.cpu_count()} cores; seconds are of a machine that others may use too."
    Path(wanted).write_text(f"{head}\n\n{text}\n")
    return f"written to {wanted}"


def _markdown(title: str) -> str:
    rows = _tables[title]
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(cells.get(column, "") for column in columns)] for row, cells in rows.items()]
    return "\n".join([f"{title}", "", *(_line(cells) for cells in lines)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
