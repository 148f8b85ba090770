"""Range coder (G. N. N. Martin 1979) with a 64-bit range and frequencies of BITS bits.

It propagates carries, and its last bytes are as few as name a number in the range.

Frequencies of 24 bits, as coders in libraries have them, are too coarse for vocabularies of 128K: a
token can have no less than one of 2^24 parts, and 131,072 such parts are a hundredth of all. With
30 bits that is 0.0001 of all.
"""

from __future__ import annotations

from nextpt.base.errors import DataError

BITS = 30
# The range stays above _TOP, so that a part of 2^30 is 2^26 wide or more
_TOP, _WIDTH = 1 << 56, 64
_MASK = (1 << _WIDTH) - 1


class RangeEncoder:
    """Encodes parts [start, start + size) of 2^BITS one after another."""

    def __init__(self) -> None:
        self._low = 0
        self._range = _MASK
        self._out = bytearray()

    def encode(self, start: int, size: int) -> None:
        """Narrow the range to the part [start, start + size); `size` is at least 1."""
        part = self._range >> BITS
        self._low += part * start
        self._range = part * size
        if self._low > _MASK:
            self._carry()
        while self._range < _TOP:
            self._out.append(self._low >> (_WIDTH - 8))
            self._low = (self._low << 8) & _MASK
            self._range <<= 8

    def _carry(self) -> None:
        self._low &= _MASK
        index = len(self._out) - 1
        while self._out[index] == 0xFF:
            self._out[index] = 0
            index -= 1
        self._out[index] += 1

    def finish(self) -> bytes:
        """Return all bytes.

        The decoder reads zeros behind them, so the fewest bytes that name a number in the range are
        enough.
        """
        for kept in range(_WIDTH // 8 + 1):
            step = 1 << (_WIDTH - 8 * kept)
            value = -(-self._low // step) * step  # the first multiple of `step` from `low` on
            if value < self._low + self._range:
                if value > _MASK:
                    self._low = value
                    self._carry()
                    value = self._low
                self._out += value.to_bytes(_WIDTH // 8, "big")[:kept]
                break
        return bytes(self._out).rstrip(b"\0")


class RangeDecoder:
    """Decodes what `RangeEncoder` wrote.

    For each part, `peek` returns a number in it, and `take` consumes the part.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._next = _WIDTH // 8
        self._code = int.from_bytes(data[: self._next].ljust(self._next, b"\0"), "big")
        self._range = _MASK

    def peek(self) -> int:
        """Return a number of [0, 2^BITS) in the next part.

        Raises:
            DataError: No encoder wrote these bytes.
        """
        self._part = self._range >> BITS
        number = self._code // self._part
        if number >> BITS:
            raise DataError("the coded data is damaged")
        return number

    def take(self, start: int, size: int) -> None:
        """Consume the part [start, start + size), which holds the number that `peek` returned."""
        self._code -= self._part * start
        self._range = self._part * size
        while self._range < _TOP:
            byte = self._data[self._next] if self._next < len(self._data) else 0
            self._code = ((self._code << 8) | byte) & _MASK
            self._next += 1
            self._range <<= 8
