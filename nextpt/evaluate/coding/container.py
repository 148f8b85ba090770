"""The form of a coded file, all numbers little-endian.

    "nxpt" | uint8 version | uint16 threads | uint16 rows | uint32 window | 16 bytes digest of the
    model | uint64 bytes | uint64 tokens | uint8 length of the environment | the environment, ASCII
    then for every SEGMENT tokens, the last ones fewer: uint32 bytes of code | uint32 CRC-32 of it |
    uint32 CRC-32 of the bytes that it stands for | the code

An environment is what a probability's last bit depends on beside the model: library versions, the
processor's instructions, the device.
"""

from __future__ import annotations

import platform
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import DataError
from nextpt.base.files import canonical_json
from nextpt.config import Config
from nextpt.model import Decoder

MAGIC, VERSION = b"nxpt", 2
SEGMENT = 2**20  # tokens that one checksum is over: a mistake is found before much is decoded
_FIXED = struct.Struct("<4sBHHI16sQQB")
_FRAME = struct.Struct("<III")
# So that the header, the first frame included, is 128 bytes at most
LONGEST_ENVIRONMENT = 128 - _FIXED.size - _FRAME.size


@dataclass(frozen=True)
class Header:
    """threads: of torch on a CPU. rows, window: of lockstep.run. size: bytes of the original. tokens: that they were cut into."""

    threads: int
    rows: int
    window: int
    model: bytes
    size: int
    tokens: int
    environment: str

    def pack(self) -> bytes:
        environment = self.environment.encode("ascii")
        return (
            _FIXED.pack(
                MAGIC,
                VERSION,
                self.threads,
                self.rows,
                self.window,
                self.model,
                self.size,
                self.tokens,
                len(environment),
            )
            + environment
        )

    @property
    def segments(self) -> list[int]:
        """Tokens of each."""
        return [min(SEGMENT, self.tokens - first) for first in range(0, self.tokens, SEGMENT)]


def pack_segment(code: bytes, original: bytes) -> bytes:
    """A frame and the code. original: the bytes that it stands for."""
    return _FRAME.pack(len(code), zlib.crc32(code), zlib.crc32(original)) + code


def header_bytes(coded: bytes) -> int:
    """Of a coded file, up to the first code."""
    return (
        _FIXED.size
        + coded[_FIXED.size - 1]
        + (_FRAME.size if len(coded) > _FIXED.size + coded[_FIXED.size - 1] else 0)
    )


def unpack(data: bytes, name: str) -> tuple[Header, list[tuple[bytes, int]]]:
    """(header, (code, checksum) of every segment). name: of the file, for errors.

    Raises DataError.
    """
    if not data.startswith(MAGIC) or len(data) < 5:
        raise DataError(f"{name} was not made by nextpt compress")
    if data[4] != VERSION:
        raise DataError(
            f"{name} has version {data[4]} of the coded form; this nextpt reads {VERSION}"
        )
    cut_off = DataError(f"{name} is cut off or damaged; nothing of it was decoded")
    if len(data) < _FIXED.size:
        raise cut_off
    _, _, threads, rows, window, model, size, tokens, length = _FIXED.unpack_from(data)
    at = _FIXED.size + length
    try:
        header = Header(
            threads, rows, window, model, size, tokens, data[_FIXED.size : at].decode("ascii")
        )
    except UnicodeDecodeError:
        raise cut_off from None
    # A token stands for a byte at least, and a row for a token: more are no sizes of a file.
    if (
        len(header.environment) != length
        or tokens > size
        or window < 2
        or not threads
        or (tokens and not 0 < rows <= tokens)
    ):
        raise cut_off
    if -(-tokens // SEGMENT) > (len(data) - at) // _FRAME.size:  # before a list of so many is made
        raise cut_off
    segments = []
    for _ in header.segments:
        if len(data) < at + _FRAME.size:
            raise cut_off
        count, own, checksum = _FRAME.unpack_from(data, at)
        at += _FRAME.size
        segments.append((data[at : at + count], checksum))
        if zlib.crc32(segments[-1][0]) != own:
            raise cut_off
        at += count
    if at != len(data):
        raise cut_off
    return header, segments


def digest(config: Config, model: Decoder, tokenizer: Tokenizer) -> bytes:
    """16 bytes that name a model: its shape, weights and tokenizer, wherever they lie."""
    hashed = xxhash.xxh3_128()
    hashed.update(
        canonical_json(
            [config.model.model_dump(exclude={"attention", "cross_entropy"}), config.max_position]
        ).encode()
    )
    hashed.update(tokenizer.sha256.encode())
    for name, parameter in sorted(model.named_parameters()):
        hashed.update(name.encode())
        hashed.update(parameter.detach().float().cpu().contiguous().numpy())
    return hashed.digest()


def environment(device: torch.device) -> str:
    """In words, ASCII, at most LONGEST_ENVIRONMENT characters."""
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.backends.cpu.get_cpu_capability()} {_processor()}"
    )
    words = f"torch {torch.__version__} numpy {np.__version__} {platform.machine()} {where}"
    words = words.encode("ascii", "replace").decode()
    if len(words) > LONGEST_ENVIRONMENT:
        words = words[: LONGEST_ENVIRONMENT - 9] + " " + xxhash.xxh32_hexdigest(words)
    return words


def _processor() -> str:
    """Its name: libraries choose by more of it than the instructions that torch tells of."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.processor()
