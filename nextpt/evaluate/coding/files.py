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
    Header,
    Kind,
    Segment,
    environment,
    header_bytes,
    inflate,
    legacy_digests,
    model_digest,
    pack_segment,
    shortest,
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
SEQUENCES_BYTES = 2**31  # of all sequences together, unless sequences are asked for
# Of probabilities and frequencies, for each token of the vocabulary: what `cumulative` holds
FREQUENCY_BYTES = 48


@dataclass(frozen=True)
class CompressionResult:
    """Sizes and times of compressing a file.

    Attributes:
        bytes: Bytes of the original.
        tokens: Tokens that it was cut into.
        payload: Bytes of the segments.
        header: Bytes of the header.
        segments: Segments of the file.
        stored: Segments that are stored or deflated, since the model's code of them is longer.
        code_length: Bytes that the model's own probabilities ask for, to the fraction.
        model_bytes: Bytes of the model's weights, fp32.
        seconds: Time of coding.
        verify_seconds: Time of decoding it again.
    """

    bytes: int
    tokens: int
    payload: int
    header: int
    segments: int
    stored: int
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
            DataError: The sequences' caches are larger than the memory, or the original does not
                come back: the device does not repeat its arithmetic.
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
        if problem := self._memory_problem(header.sequences):
            raise DataError(f"--sequences {header.sequences} is too many: {problem}")
        segments, bits, first = [], 0.0, 0
        with _deterministic(header.threads):
            for number, count in enumerate(header.segments):
                segment = tokens[first : first + count]
                encoder = TokenEncoder(segment, min(header.sequences, count))
                phase = f"coding {number + 1} of {len(header.segments)}"
                bits += self._run(header, encoder, count, partial(progress, phase))[1]
                segments.append(shortest(encoder.coder.finish(), self.codec.decode(segment)))
                first += count
        coded = b"".join([header.pack(), *map(pack_segment, segments)])
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
            segments=len(segments),
            stored=sum(segment.kind != Kind.CODE for segment in segments),
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
        parts, left = [], header.size
        with _deterministic(header.threads):
            for number, (count, segment) in enumerate(zip(header.segments, segments, strict=True)):
                place = f"segment {number + 1} of {len(segments)}"
                phase = f"decoding {number + 1} of {len(segments)}"
                part = self._decode_segment(header, segment, count, left, partial(progress, phase))
                if part is None:
                    raise DataError(
                        f"{name} is damaged: {place} stands for more than the {left} bytes that its"
                        " size leaves for it, or is no deflated data"
                    )
                if zlib.crc32(part) != segment.checksum:
                    raise DataError(
                        f"{name}: {place} is whole, but something else comes out of it: the"
                        " arithmetic here is not that of where it was coded"
                    )
                parts.append(part)
                left -= len(part)
        if left:
            raise DataError(
                f"{name} is damaged: {header.size - left} bytes came out of it, it says"
                f" {header.size}"
            )
        return b"".join(parts)

    def _decode_segment(
        self, header: Header, segment: Segment, count: int, limit: int, progress: Progress
    ) -> bytes | None:
        """Return a segment's original; None where it has more bytes than `limit`, or is damaged."""
        if segment.kind == Kind.STORED:
            return segment.body if len(segment.body) <= limit else None
        if segment.kind == Kind.DEFLATED:
            return inflate(segment.body, limit)
        tokens, _ = self._run(header, TokenDecoder(segment.body), count, progress)
        return self.codec.decode(tokens) if self.codec.size(tokens) <= limit else None

    def _check(self, header: Header, name: str) -> None:
        """Raise DataError unless this model and environment can decode the file."""
        digests = (
            legacy_digests(self.model, self.tokenizer) if header.version == 2 else [self.digest]
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
        if problem := self._memory_problem(header.sequences):
            raise DataError(
                f"{name} asks for {header.sequences} sequences, and {problem}; it is damaged, or is"
                " to be decoded where it was coded"
            )

    def _memory_problem(self, sequences: int) -> str | None:
        """Why sequences cannot be coded together; None where the free memory has room for them."""
        needed = sequences * self._sequence_bytes()
        if self.device.type == "cuda":
            available = torch.cuda.mem_get_info(self.device)[0]
        else:
            available = psutil.virtual_memory().available
        if needed <= available:
            return None
        return (
            f"they take {needed / 2**30:.1f} GiB where this machine has {available / 2**30:.1f} GiB"
            " left"
        )

    def _default_sequences(self, tokens: int) -> int:
        """As many sequences as the file's tokens and the memory of the caches allow."""
        most = SEQUENCES_BYTES // self._sequence_bytes()
        return max(min(tokens // MIN_SEQUENCE_TOKENS, MAX_SEQUENCES, most), 1)

    def _sequence_bytes(self) -> int:
        """Bytes of one sequence: its fp32 cache, and the frequencies of its next token."""
        spec = self.model.spec
        return 4 * count(spec).cache_elements + FREQUENCY_BYTES * spec.vocab_size

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
