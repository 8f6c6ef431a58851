"""Runs a command with its output in a log, and finds the reason in the log where it failed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from .errors import BuildError

#: What the first error of a failed build looks like, the most telling first.
_ERROR_PATTERNS = (
    r"^\s*(\S+:\d+:(\d+:)?|cc1(plus)?:|[\w+-]*(g\+\+|gcc|c\+\+|clang):) (fatal )?error: ",
    r"^\s*CMake Error",
    r"undefined reference to|multiple definition of|ld: cannot find|cannot find -l",
    r"internal compiler error|Killed signal terminated program",
    r"NewConnectionError|NameResolutionError|ProxyError|SSLError|ReadTimeoutError|No space left on device",
    r"^\s*(\w+\.)*\w*(Error|Exception): ",
    r"^\s*ERROR: ",
)


def first_error(log: str, lines: int = 3) -> str:
    """Return the first error in a build's `log` and what follows it: at most `lines` of 320 characters."""
    text = log.splitlines()
    for pattern in _ERROR_PATTERNS:
        for number, line in enumerate(text):
            if re.search(pattern, line):
                found = [entry.strip() for entry in text[number : number + 2 * lines] if entry.strip()]
                return "\n".join(entry[:320] for entry in found[:lines])
    return "\n".join(line.strip()[:320] for line in text if line.strip())[-320:] or "(the log is empty)"


def run_logged(
    command: list[str],
    log: Path,
    what: str,
    advice: str,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] = lambda line: None,
) -> None:
    """Run `command`, append its output to `log` and hand each line to `on_line`.

    Raises:
        BuildError: it failed; the text holds `what`, the first error, the log's path and `advice`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a+", errors="replace") as file:
        file.write(f"\n$ {shlex.join(command)}\n")
        start = file.tell()
        process = subprocess.Popen(
            command, env=env, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        with process:
            for line in process.stdout or ():
                file.write(line)
                on_line(line)
        file.flush()
        if process.returncode != 0:
            file.seek(start)
            raise BuildError(f"{what} failed:\n{_indent(first_error(file.read()))}\nFull log: {log}\n{advice}")


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def pip(*arguments: str) -> list[str]:
    """Return the command that runs this environment's pip."""
    return [sys.executable, "-m", "pip", *arguments]


if __name__ == "__main__":  # python -m toolkit.horovod_build.logged LOG
    print(_indent(first_error(Path(sys.argv[1]).read_text(errors="replace"))))
