"""Compression of gradients: fewer bytes a step, for links that are slower than the arithmetic that saves them.

A scheme works on one flat float32 array that holds all of a rank's gradients one after the other, and on a `Wire`,
which is whatever joins the ranks. It knows no framework. The schemes are

| name | on the wire, of n gradients on N ranks, from each rank | what is lost |
|---|---|---|
| `none` | 8·n·(N−1)/N bytes | nothing |
| `fp16`, `bf16` | half of it | digits: values are rounded to 11 or 8 bits |
| `int8` | a quarter | what is under 1/254 of a tensor's largest value is delayed (error feedback) |
| `topk`, `topk:0.01` | 8·(N−1)·share·n bytes | all but the largest 1 % is delayed (error feedback) |
| `powersgd`, `powersgd:4` | what two matrices of rank 4 have in place of one | what they can't tell is delayed (same) |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from toolkit.compression.common import Compressor as Compressor
from toolkit.compression.common import Uncompressed
from toolkit.compression.common import Wire as Wire
from toolkit.compression.powersgd import DEFAULT_RANK, PowerSGD
from toolkit.compression.quantised import Bf16, Fp16, Int8
from toolkit.compression.topk import DEFAULT_SHARE, TopK
from toolkit.errors import UsageError

NAMES = ("none", "fp16", "bf16", "int8", "topk", "powersgd")
_PLAIN: dict[str, Callable[[Sequence[tuple[int, ...]], int], Compressor]] = {
    "none": Uncompressed,
    "fp16": Fp16,
    "bf16": Bf16,
    "int8": Int8,
}
_LONGEST = 2**31 - 1  # MPI counts in 32 bits, and top-k's indices have as many


def make(name: str, shapes: Sequence[Sequence[int]], extra: int = 0) -> Compressor:
    """The compressor of that name for gradients of these shapes.

    Args:
        name: one of `NAMES`; `topk:SHARE` with 0 < SHARE ≤ 1, `powersgd:RANK` with RANK ≥ 1.
        shapes: of the gradients in the order in which the flat array holds them, alike on all ranks.
        extra: how many values come after them, such as flags, that are averaged as float32 in the same messages.

    Raises:
        UsageError: another name or argument, or more values than one message can hold.
    """
    tensors = [tuple(int(length) for length in shape) for shape in shapes]
    scheme, colon, argument = name.partition(":")
    if scheme not in NAMES or (colon and scheme in _PLAIN):
        raise UsageError(f"compression is {name!r}: give one of {', '.join(NAMES)}, topk:0.01 or powersgd:4.")
    values = sum(math.prod(shape) for shape in tensors) + extra
    if values > _LONGEST:
        raise UsageError(f"{values} gradients: compression takes at most {_LONGEST} of one optimizer; use several.")
    if scheme == "topk":
        return TopK(tensors, _share(argument) if colon else DEFAULT_SHARE, extra)
    if scheme == "powersgd":
        return PowerSGD(tensors, _rank(argument) if colon else DEFAULT_RANK, extra)
    return _PLAIN[scheme](tensors, extra)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UsageError(f"compression topk:{text}: give the share of gradients to send, over 0 up to 1, as topk:0.01.")
    return share


def _rank(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text[:9]) >= 1):
        raise UsageError(f"compression powersgd:{text}: give the rank, a whole number of at least 1, as powersgd:4.")
    return int(text[:9])
