"""float32 to 16-bit floats and back, rounded to nearest, ties to even, by operations on whole blocks.

numpy's own conversion to float16 takes four times as long, and it has no bfloat16.
"""

from __future__ import annotations

import numpy as np

from toolkit.compression.common import BLOCK

_TO_FP16 = 0x7C00, 0x7E00  # infinity, NaN
_TO_BF16 = 0x7F80, 0x7FC0
_OVERFLOW = np.float32(65520)  # from here on float16 rounds to infinity


class Fp16:
    """IEEE 754 binary16: 11 bits of precision, 6e-8 … 65,504."""

    def __init__(self) -> None:
        self._bits = np.empty(BLOCK, np.uint32)
        self._small = np.empty(BLOCK, np.float32)
        self._sign = np.empty(BLOCK, np.uint32)
        # An array, because numpy's minimum with a number takes five times as long.
        self._first_normal = np.full(BLOCK, 2.0**-14, np.float32)
        self._all = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)

    def encode(self, values: np.ndarray, codes: np.ndarray) -> None:
        """Write `values` (float32, at most `BLOCK`) as uint16 into `codes`."""
        n = len(values)
        bits, small, sign = self._bits[:n], self._small[:n], self._sign[:n]
        magnitude = bits.view(np.float32)
        np.abs(values, out=magnitude)
        np.minimum(magnitude, self._first_normal[:n], out=small)
        # 0.5 + x has its last bit at 2^-24, as float16 has below 2^-14: the addition rounds as it should.
        np.add(small, np.float32(0.5), out=small)
        np.maximum(magnitude, self._first_normal[:n], out=magnitude)
        special = not magnitude.max() < _OVERFLOW  # or NaN
        _round(bits, 13, sign)
        np.add(bits, small.view(np.uint32), out=bits)
        np.right_shift(values.view(np.uint32), 16, out=sign)
        np.bitwise_and(sign, 0x8000, out=sign)
        # Below 2^-14 the first is 2^-14's, else the second is; the exponent's bias is 15 in place of 127.
        np.subtract(bits, (127 - 15 + 1) * 1024 + 0x3F000000, out=bits)
        np.bitwise_or(bits, sign, out=bits)
        np.copyto(codes, bits, casting="unsafe")
        if special:
            _mark(values, codes, np.abs(values) >= _OVERFLOW, _TO_FP16)

    def decode(self, codes: np.ndarray, values: np.ndarray) -> None:
        """Write `codes` (uint16) as float32 into `values`."""
        np.take(self._all, codes, out=values, mode="clip")


class Bf16:
    """bfloat16: 8 bits of precision, the range of float32."""

    def __init__(self) -> None:
        self._bits = np.empty(BLOCK, np.uint32)
        self._last = np.empty(BLOCK, np.uint32)

    def encode(self, values: np.ndarray, codes: np.ndarray) -> None:
        """Write `values` (float32, at most `BLOCK`) as uint16 into `codes`."""
        bits = self._bits[: len(values)]
        np.copyto(bits, values.view(np.uint32))
        _round(bits, 16, self._last[: len(values)])
        np.copyto(codes, bits, casting="unsafe")
        if np.isnan(values.max()):  # whose bits may have been rounded to infinity, or past it
            _mark(values, codes, np.isinf(values), _TO_BF16)

    def decode(self, codes: np.ndarray, values: np.ndarray) -> None:
        """Write `codes` (uint16) as float32 into `values`."""
        bits = values.view(np.uint32)
        np.copyto(bits, codes)
        np.left_shift(bits, 16, out=bits)


def _round(bits: np.ndarray, drop: int, work: np.ndarray) -> None:
    """bits >> drop, rounded to nearest, ties to even."""
    np.right_shift(bits, drop, out=work)
    np.bitwise_and(work, 1, out=work)
    np.add(bits, (1 << (drop - 1)) - 1, out=bits)
    np.add(bits, work, out=bits)
    np.right_shift(bits, drop, out=bits)


def _mark(values: np.ndarray, codes: np.ndarray, infinite: np.ndarray, infinity_and_nan: tuple[int, int]) -> None:
    """Put infinities and NaN, with their signs, where they belong."""
    sign = (values.view(np.uint32) >> 16).astype(np.uint16) & 0x8000
    for places, code in zip((infinite, np.isnan(values)), infinity_and_nan, strict=True):
        codes[places] = sign[places] | code
