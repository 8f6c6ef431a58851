"""Every recipe held against one worker, and against torch's, by `hvdkit verify`; arguments are verify's own.

python tests/proof.py -np 1,2,4 --steps 50      # make proof
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

EXAMPLES = ("cnn", "linear_regression")
DEFAULTS = ["-np", "1,2,4"]


def recipes() -> dict[str, list[str]]:
    """Names to commands for one worker, of the frameworks that are installed; Keras on each backend."""
    backends = [name for name in ("torch", "tensorflow") if find_spec(name)]
    commands = {}
    for example in EXAMPLES:
        for backend in backends:
            commands[f"{example} {backend}"] = ["python", f"recipes/{example}_{backend}.py"]
            if find_spec("keras"):
                keras = ["env", f"KERAS_BACKEND={backend}", "python", f"recipes/{example}_keras.py"]
                commands[f"{example} keras on {backend}"] = keras
    return commands


def verify(name: str, arguments: list[str], against: bool = True) -> list[str]:
    """The verify command of a recipe; against torch's, where that is wanted, there is one and it is another."""
    reference = f"{name.split()[0]} torch"
    found = recipes()
    if against and reference in found and reference != name:
        arguments = [*arguments, "--against", " ".join(found[reference])]
    return [sys.executable, "-m", "toolkit.cli", "verify", *arguments, "--", *found[name]]


def main() -> int:
    """Verify every recipe; 1 where one fails."""
    arguments = sys.argv[1:]
    failed = []
    for name in recipes():
        if subprocess.run(verify(name, [*DEFAULTS, *arguments]), check=False).returncode:
            failed.append(name)
        print(flush=True)
    print(f"failed: {', '.join(failed)}" if failed else "every recipe computes on N workers what it does on one")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
