"""The connections that Horovod makes to the other workers of an elastic job: known, cut, and seen to be cut."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path

_made: dict[int, int] = {}  # descriptors to what tells them from later ones under the same number


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Take the connections that this process makes in a `with` block for Horovod's."""
    before = _sockets()
    yield
    _made.update(_sockets().items() - before.items())


def cut() -> None:
    """End those that there are, which the workers at their other ends see.

    Horovod leaves them open when it was shut down after a worker's loss. A worker that has not noticed the loss may
    be waiting for this one, not for the lost one: it would go on waiting until Gloo's time is up, half a minute,
    where the end of this connection tells it at once.
    """
    for descriptor in _there():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
            connection.shutdown(socket.SHUT_RDWR)


def forget() -> None:
    """Know of none any more."""
    _made.clear()


def any_is_cut() -> bool:
    """Whether one has ended, at this end or the other."""
    there = _there()
    poll = select.poll()
    for descriptor in there:
        poll.register(descriptor, select.POLLRDHUP)
    return len(there) < len(_made) or bool(poll.poll(0))


def _there() -> set[int]:
    return {descriptor for descriptor, _ in _sockets().items() & _made.items()}


def _sockets() -> dict[int, int]:
    """This process's sockets."""
    found = {}
    for entry in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):
            if entry.is_socket():
                found[int(entry.name)] = entry.stat().st_ino
    return found
