"""The way to a host: its name, the port of its ssh, a login without a password; and why one of them fails.

Nothing is asked for and no known_hosts is changed: ssh's BatchMode refuses a host whose key is not known, where it
would otherwise ask, and UpdateHostKeys, which writes without asking, is off. Where ssh's own configuration accepts new
keys (`StrictHostKeyChecking accept-new` or `no`), that holds here as for the launchers.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import shlex
import socket
import threading
from dataclasses import dataclass

from toolkit.doctor import processes
from toolkit.doctor.checks import one_line
from toolkit.hostfile import Host


@dataclass(frozen=True)
class Ssh:
    """How to log in, as for `hvdkit launch`: None leaves it to ssh."""

    port: int | None = None
    key: str | None = None

    def options(self, host: Host) -> list[str]:
        """Port, key and user."""
        return self._way() + ([] if host.user is None else ["-l", host.user])

    def _way(self) -> list[str]:
        words = [] if self.port is None else ["-p", str(self.port)]
        return words + ([] if self.key is None else ["-i", self.key])

    def command(self, host: Host, seconds: float) -> list[str]:
        """The words before a command for the host."""
        settings = {
            "BatchMode": "yes",
            "ConnectTimeout": str(max(1, round(seconds))),
            "UpdateHostKeys": "no",
            "ControlMaster": "no",  # one in the background would outlive the doctor
            "ClearAllForwardings": "yes",
        }
        words = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
        return ["ssh", "-T", *words, *self.options(host), "--", host.name]

    def by_hand(self, host: Host) -> str:
        """What a user types to log in."""
        return shlex.join(["ssh", *self.options(host), host.name])

    def copy_by_hand(self, host: Host) -> str:
        """What a user types to bring the public key there; ssh-copy-id takes no `-l`."""
        return shlex.join(["ssh-copy-id", *self._way(), host.name if host.user is None else f"{host.user}@{host.name}"])


@dataclass(frozen=True)
class Target:
    """What ssh's configuration makes of a host: the name or address and the port that it connects to.

    `through` is the proxy that it goes through instead, or "".
    """

    name: str
    port: int
    through: str = ""


async def target(ssh: Ssh, host: Host, seconds: float) -> Target:
    """Where ssh would connect to.

    Raises:
        OSError: there is no ssh.
    """
    told = await processes.run(["ssh", "-G", *ssh.options(host), "--", host.name], seconds)
    found = dict(line.split(" ", 1) for line in told.out.splitlines() if " " in line)
    port = found.get("port", "")
    through = next((found[key] for key in ("proxyjump", "proxycommand") if found.get(key, "none") != "none"), "")
    return Target(found.get("hostname", host.name), int(port) if port.isdecimal() else ssh.port or 22, through)


async def resolve(name: str) -> list[str]:
    """A name's addresses, each once.

    Raises:
        OSError: it has none.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[str]] = loop.create_future()

    def settle(addresses: list[str], error: OSError | None) -> None:
        if not answer.done():
            answer.set_exception(error) if error else answer.set_result(addresses)

    def look() -> None:
        addresses, failed = [], None
        try:
            addresses = [str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
        except (OSError, UnicodeError) as error:
            failed = OSError(getattr(error, "strerror", None) or str(error))
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            loop.call_soon_threadsafe(settle, list(dict.fromkeys(addresses)), failed)

    # Not the loop's own threads: it waits for those at its end, and a name server may take minutes not to answer.
    threading.Thread(target=look, daemon=True).start()
    return await answer


def is_loopback(address: str) -> bool:
    """Whether an address is of the machine itself alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    return False


async def greeting(address: str, port: int) -> bytes:
    """The first words of what listens on a port.

    Raises:
        OSError: nothing does.
    """
    reader, writer = await asyncio.open_connection(address, port)
    try:
        return await reader.read(255)
    finally:
        writer.close()


_REASONS: tuple[tuple[str, str, str], ...] = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key is not the one in known_hosts",
        "ask the site whether the host was installed anew; only then `ssh-keygen -R {name}`, and log in once: {hand}",
    ),
    (
        r"Host key verification failed|host key is known",
        "its host key is unknown",
        "log in once by hand, `{hand}`, compare the fingerprint with the site's, and accept it",
    ),
    (  # ssh goes on without the key, and is then refused too
        "Identity file .* not accessible|UNPROTECTED PRIVATE KEY|bad permissions",
        "the private key can't be used ({said})",
        "name a key with --ssh-key that exists and that only you may read: chmod 600 FILE",
    ),
    (
        r"Permission denied",
        "no login without a password ({said})",
        "bring your key there, `{copy}`, or name the right one with --ssh-key; a key with a passphrase needs ssh-agent "
        "and `ssh-add`",
    ),
    ("Too many authentication failures", "it refuses after too many keys", "name the right key with --ssh-key FILE"),
)


def reason(ssh: Ssh, host: Host, code: int, said: str) -> tuple[str, str]:
    """Why a login or the Python behind it did not work, and what to do.

    Args:
        ssh: how it was tried.
        host: where.
        code: ssh's exit code.
        said: what ssh and the host said.
    """
    hand = ssh.by_hand(host)
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith("Warning: Permanently")]
    last = one_line(lines[-1] if lines else "nothing said", 160)
    if code == 255:
        for pattern, found, fix in _REASONS:
            if re.search(pattern, said):
                telling = next((line for line in reversed(lines) if re.search(pattern, line)), last)
                words = {"name": host.name, "hand": hand, "copy": ssh.copy_by_hand(host)}
                words["said"] = one_line(telling, 160)
                return found.format(**words), fix.format(**words)
        return f"ssh fails ({last})", f"make `{hand}` work by hand first"
    return f"the login works, and then exit code {code} ({last})", f"try by hand: {hand} true"
