"""File format of compressed files: header, frames, and the checks on reading.

All numbers are little-endian.

    "nxpt" | uint8 version | uint16 threads | uint16 sequences | uint32 window | 16 bytes digest of
    the model | uint64 bytes | uint64 tokens | uint8 length of the environment | the environment,
    ASCII
    then for every SEGMENT tokens, the last ones fewer: uint32 bytes of the body, its Kind in the
    two highest bits | uint32 CRC-32 of the body | uint32 CRC-32 of the bytes that it stands for |
    the body

A body is the model's code, or where that is longer the bytes themselves, deflated (RFC 1951) where
that is shorter.

An environment is what a probability's last bit depends on beside the model: library versions, the
processor's instructions, the device.
"""

from __future__ import annotations

import itertools
import platform
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import DataError
from nextpt.base.files import canonical_json
from nextpt.model import Decoder
from nextpt.model.spec import default_ffn_width

# Versions 2 and 3 have codes only; the digest of version 2 is another, see `legacy_digests`
MAGIC, VERSION, READABLE_VERSIONS = b"nxpt", 4, (2, 3, 4)
# Above the hardware threads of any host: damage starts no thousands of threads
MAX_THREADS = 2048
SEGMENT = 2**20  # tokens under one checksum: damage is seen before much is decoded
_FIXED = struct.Struct("<4sBHHI16sQQB")
_FRAME = struct.Struct("<III")
_KIND_SHIFT = 30  # the code of SEGMENT tokens is a hundredth of 2^30 bytes
# So that the header, the first frame included, is 128 bytes at most
LONGEST_ENVIRONMENT = 128 - _FIXED.size - _FRAME.size


class Kind(IntEnum):
    """What the body of a segment is."""

    CODE = 0
    STORED = 1
    DEFLATED = 2


class Segment(NamedTuple):
    """A segment as it is stored.

    Attributes:
        kind: What the body is.
        body: Code of the model, or the original, stored or deflated.
        checksum: CRC-32 of the original.
    """

    kind: Kind
    body: bytes
    checksum: int


@dataclass(frozen=True)
class Header:
    """Header of a compressed file.

    Attributes:
        threads: Threads of torch on a CPU, at most MAX_THREADS.
        sequences: Sequences of `run_lockstep`.
        window: Window of `run_lockstep`.
        model: Digest of the model.
        size: Bytes of the original.
        tokens: Tokens that it was cut into.
        environment: Where it was coded.
        version: Version of the format.
    """

    threads: int
    sequences: int
    window: int
    model: bytes
    size: int
    tokens: int
    environment: str
    version: int = VERSION

    def pack(self) -> bytes:
        """Return the header's bytes."""
        environment = self.environment.encode("ascii")
        return (
            _FIXED.pack(
                MAGIC,
                self.version,
                self.threads,
                self.sequences,
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
        """Tokens of each segment."""
        return [min(SEGMENT, self.tokens - first) for first in range(0, self.tokens, SEGMENT)]


def shortest(code: bytes, original: bytes) -> Segment:
    """Return the shortest segment that stands for `original`; `code` is the model's code of it."""
    bodies = {Kind.CODE: code, Kind.STORED: original, Kind.DEFLATED: _deflate(original)}
    kind = min(bodies, key=lambda kind: (len(bodies[kind]), kind))
    return Segment(kind, bodies[kind], zlib.crc32(original))


def _deflate(data: bytes) -> bytes:
    deflater = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    return deflater.compress(data) + deflater.flush()


def inflate(body: bytes, limit: int) -> bytes | None:
    """Undo the deflation of a segment; None where it is damaged or longer than `limit` bytes."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = inflater.decompress(body, limit + 1)
    except zlib.error:
        return None
    return data if inflater.eof and len(data) <= limit else None


def pack_segment(segment: Segment) -> bytes:
    """Return a frame and the body."""
    size = len(segment.body) | segment.kind << _KIND_SHIFT
    return _FRAME.pack(size, zlib.crc32(segment.body), segment.checksum) + segment.body


def header_bytes(coded: bytes) -> int:
    """Count the bytes of a compressed file before the first code."""
    header = _FIXED.size + coded[_FIXED.size - 1]
    return header + (_FRAME.size if len(coded) > header else 0)


def unpack(data: bytes, name: str) -> tuple[Header, list[Segment]]:
    """Take a compressed file apart.

    Args:
        data: Content of the file.
        name: Its name in errors.

    Returns:
        The header, and every segment.

    Raises:
        DataError: It is no such file, is of another version, or is damaged.
    """
    if not data.startswith(MAGIC) or len(data) < 5:
        raise DataError(f"{name} was not made by nextpt compress")
    if data[4] not in READABLE_VERSIONS:
        raise DataError(
            f"{name} has version {data[4]} of the coded form; this nextpt reads"
            f" {' and '.join(map(str, READABLE_VERSIONS))}"
        )
    cut_off = DataError(f"{name} is cut off or damaged; nothing of it was decoded")
    if len(data) < _FIXED.size:
        raise cut_off
    _, version, threads, sequences, window, model, size, tokens, length = _FIXED.unpack_from(data)
    offset = _FIXED.size + length
    try:
        environment = data[_FIXED.size : offset].decode("ascii")
    except UnicodeDecodeError:
        raise cut_off from None
    header = Header(threads, sequences, window, model, size, tokens, environment, version)
    # A token stands for a byte at least, and a sequence for a token: more are no sizes of a file
    if (
        len(header.environment) != length
        or tokens > size
        or window < 2
        or not 0 < threads <= MAX_THREADS
        or (tokens and not 0 < sequences <= tokens)
    ):
        raise cut_off
    if -(-tokens // SEGMENT) > (len(data) - offset) // _FRAME.size:  # before a long list is made
        raise cut_off
    segments = []
    for _ in header.segments:
        if len(data) < offset + _FRAME.size:
            raise cut_off
        number, body_checksum, checksum = _FRAME.unpack_from(data, offset)
        kind, count = divmod(number, 1 << _KIND_SHIFT)
        offset += _FRAME.size
        body = data[offset : offset + count]
        if kind not in set(Kind) or zlib.crc32(body) != body_checksum:
            raise cut_off
        segments.append(Segment(Kind(kind), body, checksum))
        offset += count
    if offset != len(data):
        raise cut_off
    return header, segments


def model_digest(model: Decoder, tokenizer: Tokenizer) -> bytes:
    """Return 16 bytes that identify a model: its spec, weights and tokenizer."""
    return _digest(model.spec.to_json(), model, tokenizer)


def legacy_digests(model: Decoder, tokenizer: Tokenizer) -> Iterator[bytes]:
    """Yield the digests that version 2 of the format may have for a model.

    It hashed the config's model section, in which values that follow from others may be null, and
    beside it the resolved `max_position`.
    """
    spec = model.spec
    values = spec.to_json()
    follow = ["max_position"]
    follow += ["kv_heads"] if spec.kv_heads == spec.heads else []
    follow += ["head_dim"] if spec.head_dim == spec.width // spec.heads else []
    follow += ["ffn_width"] if spec.ffn_width == default_ffn_width(spec.ffn, spec.width) else []
    for explicit in itertools.product((True, False), repeat=len(follow)):
        nulls = {key: None for key, present in zip(follow, explicit, strict=True) if not present}
        yield _digest([values | nulls, spec.max_position], model, tokenizer)


def _digest(shape: Any, model: Decoder, tokenizer: Tokenizer) -> bytes:
    hashed = xxhash.xxh3_128()
    hashed.update(canonical_json(shape).encode())
    hashed.update(tokenizer.sha256.encode())
    for name, parameter in sorted(model.named_parameters()):
        hashed.update(name.encode())
        hashed.update(parameter.detach().float().cpu().contiguous().numpy().data)
    return hashed.digest()


def environment(device: torch.device) -> str:
    """Describe the environment in ASCII, in at most LONGEST_ENVIRONMENT characters."""
    hardware = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.backends.cpu.get_cpu_capability()} {_processor()}"
    )
    words = f"torch {torch.__version__} numpy {np.__version__} {platform.machine()} {hardware}"
    words = words.encode("ascii", "replace").decode()
    if len(words) > LONGEST_ENVIRONMENT:
        words = f"{words[: LONGEST_ENVIRONMENT - 9]} {xxhash.xxh32_hexdigest(words.encode())}"
    return words


def _processor() -> str:
    """Return the processor's name: libraries choose by more than the instructions torch names."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    match = re.search(r"model name\s*: (.*)", cpuinfo)
    return match[1] if match else platform.processor()
