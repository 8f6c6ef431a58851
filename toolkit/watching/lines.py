"""JSON messages between the workers of a job over TCP, one a line, from those only who prove to know the job's key."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
import socket
import time
from collections.abc import Sequence
from typing import Any

ANSWER = 2.0  # seconds that the other side has to answer
CALLING = 15.0  # seconds in which all workers have called rank 0
MESSAGE = 1 << 20  # longest line in bytes
_GREETING = 1 << 10  # before the other side is known


class Line:
    """JSON messages over a socket, one a line; the other side may be anyone until it is `known`."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(ANSWER)
        self.socket = connection
        self.known = False
        self.began = time.monotonic()
        self._rest = b""

    def send(self, **message: Any) -> None:
        """Send; what can't be sent is lost, and noticed by the silence."""
        with contextlib.suppress(OSError, ValueError):
            self.socket.sendall(_encoded(message) + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come.

        Raises:
            EOFError: the other side is gone, or sends what is none of ours.
        """
        limit = MESSAGE if self.known else _GREETING
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            raise EOFError from None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or max(map(len, [*lines, self._rest])) > limit:
            raise EOFError
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            raise EOFError from None
        if not all(isinstance(message, dict) for message in messages):
            raise EOFError
        return messages

    def close(self) -> None:
        """Close; the other side sees the end."""
        with contextlib.suppress(OSError):
            self.socket.close()


def cut(text: str, longest: int) -> str:
    """The text, without its middle where it is too long."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} [...] {text[-half:]}"


def _encoded(message: dict[str, Any]) -> bytes:
    """The message, its texts cut until the other side takes it: some letters take six bytes in JSON."""
    longest = MESSAGE
    while len(data := json.dumps(message).encode()) > MESSAGE and longest > 1:
        longest //= 2
        message = {name: cut(value, longest) if isinstance(value, str) else value for name, value in message.items()}
    return data


def proof(key: bytes, *parts: str) -> str:
    """What only a worker of this job can answer to a challenge."""
    return hmac.new(key, "|".join(parts).encode(), hashlib.sha256).hexdigest()


def reach(addresses: Sequence[tuple[str, int]], rank: int, key: bytes) -> Line | None:
    """A connection to rank 0, the first that both sides prove themselves on."""
    for address in addresses:
        try:
            line = Line(socket.create_connection(address, timeout=ANSWER))
        except OSError:
            continue
        try:
            challenge, own = _next(line)["challenge"], secrets.token_hex(16)
            line.send(rank=rank, proof=proof(key, "worker", str(rank), str(challenge)), challenge=own)
            if hmac.compare_digest(str(_next(line)["welcome"]).encode(), proof(key, "rank 0", own).encode()):
                line.known = True
                return line
        except (EOFError, KeyError):
            pass
        line.close()
    return None


def _next(line: Line) -> dict[str, Any]:
    """The next message, which comes alone."""
    end = time.monotonic() + 2 * ANSWER
    while time.monotonic() < end:
        messages = line.receive()
        if messages:
            return messages[0]
    raise EOFError


def listen(hosts_alike: bool) -> socket.socket:
    """A socket for the others to call: on the loopback interface where all of them are on this host."""
    if hosts_alike:
        return socket.create_server(("127.0.0.1", 0), backlog=1024)
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def addresses(listener: socket.socket, hosts_alike: bool) -> list[tuple[str, int]]:
    """Where the others may reach the listener, likely ones first."""
    port, name = listener.getsockname()[1], socket.gethostname()
    if hosts_alike:
        return [("127.0.0.1", port)]
    found = []
    try:
        import psutil  # Horovod needs it too

        for interface in psutil.net_if_addrs().values():
            found += [a.address for a in interface if a.family in (socket.AF_INET, socket.AF_INET6)]
    except ImportError:
        with contextlib.suppress(OSError):
            found = [str(info[4][0]) for info in socket.getaddrinfo(name, None)]
    usable = [a for a in dict.fromkeys(found) if not a.startswith(("127.", "::1", "fe80"))]
    return [(a, port) for a in [*sorted(usable, key=lambda a: ":" in a), name]]
