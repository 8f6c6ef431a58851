"""A link with a rate and a delay, in user space: `python slow_link.py IN OUT BITS_PER_SECOND SECONDS`.

Passes frames between two interfaces of one network namespace. Those from IN to OUT leave at that rate and arrive that
much later; those back pass as they come. It needs no qdisc of the kernel's (netem is not in every one), and takes
frames as the kernel has them, before segmentation and checksums (PACKET_VNET_HDR), so that it costs little.
"""

import collections
import contextlib
import select
import socket
import sys
import time

_ALL = 0x0003  # ETH_P_ALL
_PACKET, _VNET_HDR, _IGNORE_OUTGOING = 263, 15, 23  # SOL_PACKET and its options, in linux/if_packet.h
_LARGEST = 1 << 17  # bytes of a frame before segmentation
_QUEUE = 1 << 20  # bytes that wait at most; what comes then is dropped, as by a switch


def interface(name: str) -> socket.socket:
    """A socket for all frames that come in on an interface, each with its virtio header."""
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL))
    opened.setsockopt(_PACKET, _VNET_HDR, 1)
    opened.setsockopt(_PACKET, _IGNORE_OUTGOING, 1)
    opened.bind((name, _ALL))
    return opened


def shape(slow: socket.socket, fast: socket.socket, rate: float, delay: float) -> None:
    """Pass frames for ever."""
    queue: collections.deque[tuple[float, bytes]] = collections.deque()  # when each arrives
    waiting, free = 0, 0.0  # bytes in the queue; when the line has sent what is in it
    while True:
        due = queue[0][0] - time.monotonic() if queue else None
        ready, _, _ = select.select([slow, fast], [], [], due if due is None else max(0.0, due))
        now = time.monotonic()
        for source in ready:
            with contextlib.suppress(OSError):  # the interface is down
                frame = source.recv(_LARGEST)
                if source is fast:
                    slow.send(frame)
                elif waiting < _QUEUE:
                    free = max(free, now) + 8 * len(frame) / rate
                    queue.append((free + delay, frame))
                    waiting += len(frame)
        while queue and queue[0][0] <= now:
            frame = queue.popleft()[1]
            waiting -= len(frame)
            with contextlib.suppress(OSError):
                fast.send(frame)


if __name__ == "__main__":
    shape(interface(sys.argv[1]), interface(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
