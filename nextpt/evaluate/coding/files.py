"""Lossless compression and decompression of files by a model's predictions."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import DataError
from nextpt.base.files import atomic_write
from nextpt.evaluate.coding.container import (
    MAX_THREADS,
    VERSION,
    Header,
    environment,
    header_bytes,
    legacy_digests,
    model_digest,
    pack_segment,
    unpack,
)
from nextpt.evaluate.coding.lockstep import TokenCoder, TokenDecoder, TokenEncoder, run_lockstep
from nextpt.evaluate.coding.text import ByteCodec
from nextpt.evaluate.progress import PartProgress, Progress, ignore_part_progress
from nextpt.model import Decoder, count

# More sequences are faster, but each begins without context: none is shorter, unless the file is
MAX_SEQUENCES, MIN_SEQUENCE_TOKENS = 64, 1024
# A file may be decoded on a machine with fewer processors than it was coded on, in the same threads
THREADS_PER_PROCESSOR = 4
CACHE_BYTES = 2**31  # of keys and values of all sequences together, unless sequences are asked for


@dataclass(frozen=True)
class CompressionResult:
    """Sizes and times of compressing a file.

    Attributes:
        bytes: Bytes of the original.
        tokens: Tokens that it was cut into.
        payload: Bytes of code.
        header: Bytes of the header.
        code_length: Bytes that the model's own probabilities ask for, to the fraction.
        model_bytes: Bytes of the model's weights, fp32.
        seconds: Time of coding.
        verify_seconds: Time of decoding it again.
    """

    bytes: int
    tokens: int
    payload: int
    header: int
    code_length: float
    model_bytes: int
    seconds: float
    verify_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the ratios of them, for JSON."""
        size = self.bytes
        return asdict(self) | {
            "total": self.payload + self.header,
            "bits_per_byte": 8 * self.payload / size if size else None,
            "bits_per_byte_total": 8 * (self.payload + self.header) / size if size else None,
        }


class FileCoder:
    """Compresses and decompresses bytes with one model.

    Args:
        model: In evaluation mode.
        tokenizer: Its vocabulary has a token for every byte.

    Raises:
        DataError: The tokenizer lacks a token for some byte.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer) -> None:
        self.model = model.float()
        self.tokenizer = tokenizer
        self.codec = ByteCodec(tokenizer)
        self.device = next(model.parameters()).device
        self.digest = model_digest(model, tokenizer)
        self.environment = environment(self.device)

    def encode(
        self,
        data: bytes,
        sequences: int | None = None,
        progress: PartProgress = ignore_part_progress,
    ) -> tuple[bytes, CompressionResult]:
        """Compress bytes, decompress the result and compare.

        Args:
            data: Any bytes.
            sequences: Sequences that are coded together; by default chosen by the size.
            progress: Gets (phase, share of it that is done).

        Returns:
            The compressed file and its sizes and times.

        Raises:
            DataError: The original does not come back: the device does not repeat its arithmetic.
        """
        began = time.perf_counter()
        tokens = self.codec.encode(data)
        header = Header(
            min(torch.get_num_threads(), MAX_THREADS),
            min(sequences or self._default_sequences(len(tokens)), max(len(tokens), 1)),
            self.model.max_position,
            self.digest,
            len(data),
            len(tokens),
            self.environment,
        )
        parts, bits, first = [header.pack()], 0.0, 0
        with _deterministic(header.threads):
            for number, count in enumerate(header.segments):
                segment = tokens[first : first + count]
                encoder = TokenEncoder(segment, min(header.sequences, count))
                phase = f"coding {number + 1} of {len(header.segments)}"
                bits += self._run(header, encoder, count, partial(progress, phase))[1]
                parts.append(pack_segment(encoder.coder.finish(), self.codec.decode(segment)))
                first += count
        coded = b"".join(parts)
        encoded = time.perf_counter()
        if self.decode(coded, "what was coded", progress) != data:
            raise DataError(
                "the file does not come back as it was: this device does not repeat its arithmetic;"
                " nothing was written"
            )
        head = header_bytes(coded)
        return coded, CompressionResult(
            bytes=len(data),
            tokens=len(tokens),
            payload=len(coded) - head,
            header=head,
            code_length=float(bits) / 8,
            model_bytes=sum(p.numel() * 4 for p in self.model.parameters()),
            seconds=encoded - began,
            verify_seconds=time.perf_counter() - encoded,
        )

    def decode(
        self, coded: bytes, name: str, progress: PartProgress = ignore_part_progress
    ) -> bytes:
        """Decompress a file.

        Args:
            coded: Content of the compressed file.
            name: Its name in errors.
            progress: Gets (phase, share of it that is done).

        Raises:
            DataError: It is no compressed file, is damaged, or was coded by another model or in
                another environment, which would give other probabilities.
        """
        header, segments = unpack(coded, name)
        self._check(header, name)
        parts = []
        with _deterministic(header.threads):
            for number, (count, (code, checksum)) in enumerate(
                zip(header.segments, segments, strict=True)
            ):
                phase = f"decoding {number + 1} of {len(segments)}"
                tokens, _ = self._run(header, TokenDecoder(code), count, partial(progress, phase))
                parts.append(self.codec.decode(tokens))
                if zlib.crc32(parts[-1]) != checksum:
                    raise DataError(
                        f"{name}: segment {number + 1} of {len(segments)} is whole, but something"
                        " else comes out of it: the arithmetic here is not that of where it was"
                        " coded"
                    )
        data = b"".join(parts)
        if len(data) != header.size:
            raise DataError(
                f"{name} is damaged: {len(data)} bytes came out of it, it says {header.size}"
            )
        return data

    def _check(self, header: Header, name: str) -> None:
        """Raise DataError unless this model and environment can decode the file."""
        digests = (
            [self.digest]
            if header.version == VERSION
            else legacy_digests(self.model, self.tokenizer)
        )
        if header.model not in digests:
            raise DataError(
                f"{name} was coded with another model, tokenizer or step of the run:"
                f" {header.model.hex()[:12]}, this one is {self.digest.hex()[:12]}; name it with"
                " --run and --step"
            )
        if header.environment != self.environment:
            raise DataError(
                f"{name} was coded with {header.environment}; here is {self.environment}, whose"
                " probabilities may differ in their last bits, and one is enough to lose the file:"
                " decode it where it was coded"
            )
        if header.window != self.model.max_position:
            raise DataError(
                f"{name} is damaged: it says a window of {header.window}, this model has"
                f" {self.model.max_position} positions"
            )
        self._check_counts(header, name)

    def _check_counts(self, header: Header, name: str) -> None:
        """Raise DataError where the header asks for more than this machine has."""
        processors = os.cpu_count() or 1
        if header.threads > THREADS_PER_PROCESSOR * processors:
            raise DataError(
                f"{name} asks for {header.threads} threads, and this machine has {processors}"
                " processors; it is damaged, or is to be decoded where it was coded"
            )
        caches = header.sequences * self._cache_bytes()
        if self.device.type == "cuda":
            available = torch.cuda.mem_get_info(self.device)[0]
        else:
            available = psutil.virtual_memory().available
        if caches > available:
            raise DataError(
                f"{name} asks for caches of {header.sequences} sequences, {caches / 2**30:.1f} GiB,"
                f" and this machine has {available / 2**30:.1f} GiB left; it is damaged, or is to"
                " be decoded where it was coded"
            )

    def _default_sequences(self, tokens: int) -> int:
        """As many sequences as the file's tokens and the memory of the caches allow."""
        most = CACHE_BYTES // self._cache_bytes()
        return max(min(tokens // MIN_SEQUENCE_TOKENS, MAX_SEQUENCES, most), 1)

    def _cache_bytes(self) -> int:
        """Bytes of the fp32 cache of one sequence."""
        return 4 * count(self.model.spec).cache_elements

    def _run(
        self, header: Header, coder: TokenCoder, count: int, progress: Progress
    ) -> tuple[np.ndarray, float]:
        return run_lockstep(
            self.model,
            self.tokenizer.start_id,
            coder,
            count,
            min(header.sequences, count),
            header.window,
            progress,
        )


@contextmanager
def _deterministic(threads: int) -> Iterator[None]:
    """Compute with the same number of threads on both sides, and by deterministic algorithms."""
    before, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(deterministic)


def read_file(path: Path) -> bytes:
    """Read a file. Raises DataError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def write_file(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all. Raises DataError."""
    try:
        with atomic_write(path, "wb") as file:
            file.write(data)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from error
