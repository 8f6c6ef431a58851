"""Three hosts on this machine: network namespaces on a switch, each with its own name, address, processes and sshd.

    with Cluster(directory) as cluster:
        result = cluster.run("node1", ["mpirun", "-H", "node1,node2", "hostname"])
        cluster.cut("node2")

Only these namespaces are reached from within them: there is no way out. Files are those of this machine, as on a
shared disk, but /etc/hosts, users' homes, /run, /dev/shm and TMPDIR are each host's own. See `namespaces.py` for how it
all ends with the tests, however those end.
"""

from __future__ import annotations

import functools
import json
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tests import packages
from tests.hosts import namespaces, slow_link, sshd
from tests.launching import MARK, ROOT, clean_environment, kill_marked

NAMES = ("node1", "node2", "node3")
NETWORK = "192.0.2"  # kept for documentation (RFC 5737): no real host has such an address
INTERFACE = "eth0"
_TOOLS = ("unshare", "nsenter", "ip", "mount", "hostname", "ssh", "ssh-keygen", "env")
# What the kernel has to permit, and nothing else that could fail; a host is made of namespaces within namespaces.
_PROBE = "ip link add name br0 type bridge && ip link add name v0 type veth peer name v1 && mount -t tmpfs tmpfs /run"
_KILLING = 10.0  # seconds in which all processes of a job have to be killed


@functools.cache
def missing() -> str | None:
    """What this machine lacks or does not permit for a cluster; None: nothing, so that all else is an error."""
    if sshd.find() is None:
        return f"there is no sshd: install openssh-server{packages.why_none(sshd.NAME)}"
    for tool in _TOOLS:
        if shutil.which(tool, path=sshd.SBIN) is None:
            return f"there is no {tool} on the PATH"
    apart = " ".join(namespaces.APART)
    line = ["unshare", *_user(), *namespaces.APART, "sh", "-c", f"{_PROBE} && unshare {apart} hostname probe"]
    environment = {**os.environ, "PATH": sshd.SBIN}
    tried = subprocess.run(line, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    if tried.returncode == 0:
        return None
    return f"namespaces are not permitted here: {[*tried.stderr.strip().splitlines(), 'no reason given'][0][:200]}"


def _user() -> list[str]:
    """Options of unshare's for those who are not root."""
    return [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]


class Cluster:
    """Three hosts, from entering to leaving.

    Attributes:
        names: of the hosts.
        addresses: each host's, by name.
        directory: holds a directory a host, by its name, with `home` and `tmp`.
        hostfile: of one slot a host, as mpirun and horovodrun read it.
    """

    names = NAMES

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(NAMES, 1)}
        self.hostfile = directory / "hostfile"
        self._namespaces: dict[str, str] = {}  # hosts to their PID namespaces
        self._own: dict[str, set[int]] = {}  # hosts to the processes that belong to them, not to a job
        self._inits: dict[str, int] = {}
        self._switch: subprocess.Popen[str] | None = None

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._switch is not None:
            self._switch.stdin.close()  # type: ignore[union-attr]
            try:
                self._switch.wait(10)
            except subprocess.TimeoutExpired:
                self._switch.kill()  # and the system its child, process 1 of the namespaces
                self._switch.wait()
            self._switch.stdout.close()  # type: ignore[union-attr]
        for name in NAMES:
            shutil.rmtree(self.directory / name, ignore_errors=True)

    # --- jobs

    def run(
        self,
        host: str,
        command: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        timeout: float = 300,
        grace: float = 10,
        cwd: Path = ROOT,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end.

        Args:
            environment: added to that of `tests.launching.clean_environment`.
            timeout: seconds after which all that runs on the hosts is killed and `TimeoutExpired` is raised.
            grace: seconds after its end in which its processes on all hosts have to end.

        Raises:
            AssertionError: some host still had a process of it after that.
        """
        process, mark = self.begin(host, command, environment=environment, cwd=cwd)
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            self.kill_all()
            kill_marked(mark)
            process.communicate(timeout=30)
            raise
        left = self.kill_all(grace=grace)
        assert not left, f"still running {grace:g} s after the end: {left}\n{out[-2000:]}{err[-2000:]}"
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def begin(
        self,
        host: str,
        command: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        printed: IO[str] | int = subprocess.PIPE,
    ) -> tuple[subprocess.Popen[str], str]:
        """Begin what `run` runs to its end; `printed` is where both outputs go together, by default each to its pipe.

        Returns:
            The process, which ends as the command does, and the mark of `tests.launching` that the command carries.
        """
        mark = uuid.uuid4().hex
        own = {"HOME": self.directory / host / "home", "TMPDIR": self.directory / host / "tmp"}
        full = {**clean_environment(), **{name: str(path) for name, path in own.items()}, MARK: mark}
        full |= environment or {}
        full.pop("SSH_AUTH_SOCK", None)
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        enter = ["nsenter", "--target", str(self._inits[host]), *user, "--mount", "--net", "--uts", "--pid", "--"]
        process = subprocess.Popen(
            [*enter, "env", f"--chdir={cwd}", *map(str, command)],
            env=full,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.PIPE if printed == subprocess.PIPE else subprocess.STDOUT,
        )
        return process, mark

    def processes(self, host: str) -> dict[int, str]:
        """Process numbers, as this process sees them, and command lines of all that runs on a host but its own sshd."""
        found = {}
        for pid in _in_namespace(self._namespaces[host]) - self._own[host]:
            line = _read(pid, "cmdline").replace("\0", " ").strip()
            if line:  # else it has ended, and nobody has looked yet
                found[pid] = line
        return found

    def kill_all(self, grace: float = 0) -> dict[str, list[str]]:
        """Kill what runs on the hosts, but their own sshd, and outlives `grace` seconds.

        Returns:
            Hosts to the command lines of what had to be killed.
        """
        end = time.monotonic() + grace
        while self._left() and time.monotonic() < end:
            time.sleep(0.1)
        killed: dict[str, dict[int, str]] = {}
        end = time.monotonic() + _KILLING
        while (left := self._left()) and time.monotonic() < end:  # what was forked meanwhile is found at the next look
            for name, processes in left.items():
                killed.setdefault(name, {}).update(processes)
                self.on(name, "sh", "-c", f"kill -9 {' '.join(map(str, self._inside(processes)))} 2>&-; true")
            time.sleep(0.02)
        return {name: list(processes.values()) for name, processes in killed.items()}

    # --- administration

    def on(self, host: str, *command: str | Path) -> str:
        """What a short command prints that a host's administrator runs, who may mount, and set interfaces.

        Args:
            host: a host, or "switch", where each host's link ends in an interface of the host's name.

        Raises:
            AssertionError: it failed.
            RuntimeError: the cluster is no more.
        """
        switch = self._switch
        assert switch is not None and switch.stdin is not None
        print(json.dumps({"on": host, "command": [str(word) for word in command]}), file=switch.stdin, flush=True)
        answer = self._line()
        assert answer["code"] == 0, f"{command} on {host}: {answer['printed']}"
        return str(answer["printed"])

    def cut(self, host: str) -> None:
        """Pull a host's cable: no error at either end, only silence."""
        self.on("switch", "ip", "link", "set", host, "down")

    def join(self, host: str) -> None:
        """Plug a host's cable in again."""
        self.on("switch", "ip", "link", "set", host, "up")

    def shape(self, host: str, bits_per_second: float, seconds: float) -> None:
        """Let what a host sends leave at a rate and arrive with a delay; what it gets comes by the others' links."""
        far, near = f"{host}-far", f"{host}-near"
        self.on("switch", "ip", "link", "set", host, "nomaster")
        self.on("switch", "ip", "link", "add", far, "type", "veth", "peer", "name", near)
        self.on("switch", "ip", "link", "set", near, "master", "br0", "up")
        self.on("switch", "ip", "link", "set", far, "up")
        words = [sys.executable, slow_link.__file__, host, far, str(bits_per_second), str(seconds)]
        self.on("switch", "sh", "-c", f"{shlex.join(words)} > {self.directory}/{host}/slow_link.log 2>&1 &")

    def bind(self, host: str, source: Path, target: Path) -> None:
        """Let a host, alone, see a file or directory in place of another."""
        self.on(host, "mount", "--bind", source, target)

    # ---

    def _start(self) -> None:
        server = sshd.find()
        if server is None:
            raise RuntimeError(str(missing()))
        _lay_out(self.directory, self.addresses, server.settings)
        plan = {
            "hosts": {n: {"address": a, "directory": str(self.directory / n)} for n, a in self.addresses.items()},
            "sshd": server.program,
            "libraries": server.libraries,
        }
        line = ["unshare", *_user(), *namespaces.APART, sys.executable, namespaces.__file__, "switch", json.dumps(plan)]
        with (self.directory / "log").open("w") as log:
            pipe = subprocess.PIPE
            environment = {**os.environ, "PATH": sshd.SBIN}
            self._switch = subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment)
        told = self._line()
        self._namespaces = {name: told[name]["pid_namespace"] for name in NAMES}
        self._own = {name: _in_namespace(self._namespaces[name]) for name in NAMES}
        self._inits = {n: next(p for p in self._own[n] if self._inside([p]) == [1]) for n in NAMES}

    def _line(self) -> Any:
        """What the switch says next; it takes no longer than its commands may."""
        line = self._switch.stdout.readline() if self._switch and self._switch.stdout else ""
        if not line:
            said = (self.directory / "log").read_text()[-2000:].strip()
            raise RuntimeError(f"the cluster has ended: {said or 'nothing says why'}")
        return json.loads(line)

    def _left(self) -> dict[str, dict[int, str]]:
        return {name: processes for name in NAMES if (processes := self.processes(name))}

    def _inside(self, pids: Sequence[int] | Mapping[int, str]) -> list[int]:
        """The numbers that processes have on their own host."""
        found = (re.search(r"^NSpid:.*\t(\d+)$", _read(pid, "status"), re.MULTILINE) for pid in pids)
        return [int(match[1]) for match in found if match]


def _in_namespace(link: str) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.readlink(entry / "ns/pid") == link:
                    found.add(int(entry.name))
            except OSError:
                continue
    return found


def _read(pid: int, name: str) -> str:
    try:
        return Path("/proc", str(pid), name).read_text(errors="replace")
    except OSError:
        return ""


def _lay_out(directory: Path, addresses: Mapping[str, str], settings: str) -> None:
    """The files that hosts have of their own, in a directory each, and a hostfile.

    Args:
        settings: lines of sshd_config that this server needs.
    """
    (directory / "hostfile").write_text("".join(f"{name} slots=1\n" for name in addresses))
    key = directory / "key"
    _make_key(key)
    known = ""
    for name, address in addresses.items():
        own = directory / name
        (own / "tmp").mkdir(parents=True)
        _make_key(own / "host_key")
        known += f"{name},{name}-alone.example,{address} {(own / 'host_key.pub').read_text()}"
    # A second name, which without its domain is none.
    names = "".join(f"{address} {name} {name}-alone.example\n" for name, address in addresses.items())
    for name in addresses:
        _lay_out_etc(directory / name, names)
        _lay_out_login(directory / name, key, known, settings)


def _lay_out_etc(own: Path, names: str) -> None:
    """A host's files under /etc: names that no server is asked for, and this user, whose home is the host's own."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    users = f"{user}:*:{os.geteuid()}:{os.getegid()}::{own}/home:{shutil.which('bash') or '/bin/sh'}\n"
    files = {
        "hosts": f"127.0.0.1 localhost\n::1 localhost\n{names}",
        "resolv.conf": "",
        "nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files\nservices: files\n",
        "passwd": f"{users}sshd:*:65534:65534::/run/sshd:/bin/false\n",
        "shadow": "",
    }
    (own / "etc").mkdir()
    for name, text in files.items():
        (own / "etc" / name).write_text(text)


def _lay_out_login(own: Path, key: Path, known: str, settings: str) -> None:
    """A home from which every host is reached by its name without a password, and the settings of the host's sshd."""
    ssh = own / "home" / ".ssh"
    ssh.mkdir(parents=True)
    for directory in (ssh.parent, ssh):
        directory.chmod(0o700)
    shutil.copy(key, ssh / "id_ed25519")
    shutil.copy(key.with_suffix(".pub"), ssh / "authorized_keys")
    (ssh / "known_hosts").write_text(known)
    (own / "sshd_config").write_text(
        f"HostKey {own}/host_key\nAuthorizedKeysFile {ssh}/authorized_keys\nStrictModes no\nUsePAM no\n"
        f"PermitRootLogin yes\nPasswordAuthentication no\nPidFile none\nUseDNS no\nMaxStartups 100\n"
        f"ClientAliveInterval 5\nClientAliveCountMax 2\n"  # a login ends whose other side is cut off
        f"SetEnv TMPDIR={own}/tmp\n{settings}"
    )


def _make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True, timeout=30)
