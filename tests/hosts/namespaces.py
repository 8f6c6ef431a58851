"""What runs as process 1 in the test cluster's namespaces: one switch, and on it the hosts. Standard library alone.

`cluster.py` starts the switch in namespaces of its own, and it starts each host in further ones. All of it hangs on the
switch's standard input: when that closes, because the tests have ended or were killed, the switch exits, and the system
ends every process of the cluster, on all hosts, and removes its interfaces and mounts.

The switch takes a JSON line for a command (`{"on": "node2", "command": [...]}`, or on "switch") and answers with one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

APART = ("--mount", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
_COMMAND = 20.0  # seconds for one command


def switch(plan: dict[str, Any]) -> None:
    """Join the hosts, and run commands in their namespaces until standard input closes."""
    _run("ip", "link", "add", "br0", "type", "bridge")
    _run("ip", "link", "set", "br0", "up")
    hosts = {}
    for name, host in plan["hosts"].items():
        line = ["unshare", *APART, sys.executable, __file__, "host", json.dumps({**plan, "name": name, **host})]
        started = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        hosts[name] = started
        _heard(started, "apart")
        _run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(started.pid))
        _run("ip", "link", "set", name, "master", "br0", "up")
        _tell(started, "joined")
    pids = {name: json.loads(_heard(started, "ready")) for name, started in hosts.items()}
    inits = {name: _child_of(started.pid) for name, started in hosts.items()}
    print(json.dumps(pids), flush=True)
    for text in sys.stdin:
        asked = json.loads(text)
        inside = []
        if asked["on"] != "switch":
            inside = ["nsenter", "--target", str(inits[asked["on"]]), "--mount", "--net", "--uts", "--pid", "--"]
        print(json.dumps(_answer([*inside, *asked["command"]])), flush=True)


def host(plan: dict[str, Any]) -> None:
    """Be a host: name, addresses, files of its own under /etc, an ssh server; then take in orphans for ever."""
    print("apart", flush=True)
    sys.stdin.readline()
    _run("hostname", plan["name"])
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "address", "add", f"{plan['address']}/24", "dev", "eth0")
    _run("ip", "link", "set", "eth0", "up")
    for target in ("/run", "/dev/shm"):
        _run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", target)
    os.makedirs("/run/sshd", mode=0o755)  # where it shuts itself in before a login
    for source in Path(plan["directory"], "etc").iterdir():
        if (Path("/etc") / source.name).exists():
            _run("mount", "--bind", str(source), f"/etc/{source.name}")
    libraries = {"LD_LIBRARY_PATH": plan["libraries"]} if plan["libraries"] else {}
    log = Path(plan["directory"], "sshd.log")
    command = [plan["sshd"], "-D", "-E", str(log), "-f", str(Path(plan["directory"], "sshd_config"))]
    server = subprocess.Popen(command, env={"PATH": os.environ["PATH"], **libraries}, stdin=subprocess.DEVNULL)
    _answers(plan["address"], server, log)
    print("ready " + json.dumps({"pid_namespace": os.readlink("/proc/self/ns/pid")}), flush=True)
    os.close(1)
    while True:
        with contextlib.suppress(ChildProcessError):
            os.wait()
            continue
        time.sleep(1)


def _answers(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the ssh server takes connections."""
    end = time.monotonic() + _COMMAND
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((address, 22), timeout=1):
            return
        time.sleep(0.02)
    sys.exit(f"sshd did not start: {log.read_text()[-500:] if log.exists() else server.poll()}")


def _run(*command: str) -> None:
    done = _answer(list(command))
    if done["code"]:
        sys.exit(f"{' '.join(command)}: {done['printed'].strip()}")


def _answer(command: list[str]) -> dict[str, Any]:
    try:
        kept = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, timeout=_COMMAND, **kept)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"code": 1, "printed": str(error)}
    return {"code": done.returncode, "printed": done.stdout}


def _child_of(pid: int) -> int:
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"\nPPid:\t{pid}\n" in (entry / "status").read_text():
                return int(entry.name)
    sys.exit(f"process {pid} has no child")


def _heard(started: subprocess.Popen[str], word: str) -> str:
    """The rest of the line that the host says after this word."""
    line = started.stdout.readline() if started.stdout else ""
    if not line.startswith(word):
        sys.exit(f"a host did not start: {line.strip()}")  # its own words are on standard error
    return line.removeprefix(word).strip()


def _tell(started: subprocess.Popen[str], word: str) -> None:
    if started.stdin:
        print(word, file=started.stdin, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which then close the switch's input
    {"switch": switch, "host": host}[sys.argv[1]](json.loads(sys.argv[2]))
