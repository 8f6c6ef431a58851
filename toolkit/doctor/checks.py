"""One check's outcome, and how outcomes are shown."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TextIO

SCHEMA = 1  # of the JSON document; a number for each change that a reader could trip over
_LONGEST = 400  # characters of what a program said
_MOST_GROUPS = 4  # lines for hosts on which a check went well, in different ways

_MARKS = {True: "✓", False: "✗", None: "–"}
_PLAIN_MARKS = {True: "ok  ", False: "FAIL", None: "-   "}


@dataclass(frozen=True)
class Check:
    """What a check found.

    Attributes:
        name: what was looked at, the same for all hosts.
        host: on which host; all of them: "".
        ok: None where it does not apply.
        found: one line, cut where it is too long.
        fix: what to do, one line, and whole, as it may be a command; where `ok` is False there is one.
    """

    name: str
    host: str
    ok: bool | None
    found: str
    fix: str = ""

    def __post_init__(self) -> None:
        for name, most in (("host", _LONGEST), ("found", _LONGEST), ("fix", sys.maxsize)):
            object.__setattr__(self, name, one_line(getattr(self, name), most))


def one_line(text: str, most: int = _LONGEST) -> str:
    """A text in one line and without what would steer a terminal, as other hosts say what they like."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def document(checks: Iterable[Check], seconds: float) -> str:
    """The JSON document of a whole look."""
    listed = [dataclasses.asdict(check) for check in checks]
    ok = all(check["ok"] is not False for check in listed)
    return json.dumps({"schema": SCHEMA, "ok": ok, "seconds": round(seconds, 1), "checks": listed}, indent=2)


def lines(checks: Iterable[Check], *, plain: bool = False) -> list[str]:
    """The lines for a person: one for what is alike on several hosts, two for each ✗.

    Args:
        checks: of this machine alone, whose names then don't repeat, or of several hosts.
        plain: whether the terminal can't show the marks.
    """
    marks = _PLAIN_MARKS if plain else _MARKS
    found: list[str] = []
    for (name, ok), alike in _by_name(checks).items():
        groups = _by_found(alike)
        if ok is not False and len(groups) > _MOST_GROUPS:
            rest = [check.host for group in groups[_MOST_GROUPS - 1 :] for check in group]
            groups = groups[: _MOST_GROUPS - 1]
        else:
            rest = []
        for group in groups:
            hosts = _hosts([check.host for check in group if check.host])
            found.append(f"{marks[ok]} {name:<24} {hosts}{group[0].found}".rstrip())
            if group[0].fix:
                found.append(f"    {'fix' if ok is False else 'hint'}: {group[0].fix}")
        if rest:
            found.append(f"{marks[ok]} {name:<24} {len(rest)} more hosts")
    if plain:
        return [line.encode("ascii", "replace").decode() for line in found]
    return found


def can_show(stream: TextIO) -> bool:
    """Whether a stream can take the marks."""
    try:
        "".join(_MARKS.values()).encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def show(checks: Iterable[Check], stream: TextIO | None = None) -> None:
    """Write the lines for a person."""
    stream = stream or sys.stdout
    for line in lines(checks, plain=not can_show(stream)):
        print(line, file=stream, flush=True)


def _by_name(checks: Iterable[Check]) -> dict[tuple[str, bool | None], list[Check]]:
    """The checks of each name together, in the names' order; those that went well before those that didn't."""
    names: dict[str, list[Check]] = {}
    for check in checks:
        names.setdefault(check.name, []).append(check)
    found: dict[tuple[str, bool | None], list[Check]] = {}
    for name, alike in names.items():
        for ok in (True, None, False):
            if chosen := [check for check in alike if check.ok is ok]:
                found[name, ok] = chosen
    return found


def _by_found(checks: list[Check]) -> list[list[Check]]:
    groups: dict[tuple[str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.found, check.fix), []).append(check)
    return list(groups.values())


def _hosts(names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names) if len(names) <= _MOST_GROUPS else f"{len(names)} hosts, {names[0]} to {names[-1]}"
    return f"{shown}: "
