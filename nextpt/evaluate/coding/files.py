"""Files coded by a model, and decoded again."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import DataError
from nextpt.base.files import atomic_write
from nextpt.config import Config
from nextpt.evaluate.coding.container import (
    Header,
    digest,
    environment,
    header_bytes,
    pack_segment,
    unpack,
)
from nextpt.evaluate.coding.lockstep import Reading, Writing, run
from nextpt.evaluate.coding.text import Bytes
from nextpt.model import Decoder

# Rows make it quick, but each begins without context: none is shorter, where the file is not
MOST_ROWS, ROW_TOKENS = 64, 1024
CACHE_BYTES = 2**31  # of keys and values of all rows together, unless rows are asked for
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Coded:
    """What came of coding a file. bytes: of the original. payload, header: of the coded file. code_length: bytes that the model's own probabilities ask for, to the fraction. seconds: of coding and of decoding it again."""

    bytes: int
    tokens: int
    payload: int
    header: int
    code_length: float
    model_bytes: int
    seconds: float
    verify_seconds: float

    def as_dict(self) -> dict[str, Any]:
        size = self.bytes
        return asdict(self) | {
            "total": self.payload + self.header,
            "bits_per_byte": 8 * self.payload / size if size else None,
            "bits_per_byte_total": 8 * (self.payload + self.header) / size if size else None,
        }


class FileCoder:
    """Codes bytes with one model. Raises DataError for one whose tokenizer lacks bytes."""

    def __init__(self, config: Config, model: Decoder, tokenizer: Tokenizer) -> None:
        self.config, self.model, self.tokenizer = config, model.float(), tokenizer
        self.bytes = Bytes(tokenizer)
        self.device = next(model.parameters()).device
        self.digest, self.environment = digest(config, model, tokenizer), environment(self.device)

    def encode(
        self, data: bytes, rows: int | None = None, progress: Progress = lambda what, share: None
    ) -> tuple[bytes, Coded]:
        """(the coded file, what came of it), after it was decoded again. rows: chosen by the size unless given."""
        began = time.perf_counter()
        tokens = self.bytes.encode(data)
        header = Header(
            torch.get_num_threads(),
            min(rows or self._rows(len(tokens)), max(len(tokens), 1)),
            self.config.max_position,
            self.digest,
            len(data),
            len(tokens),
            self.environment,
        )
        parts, bits, first = [header.pack()], 0.0, 0
        with _exactly(header.threads):
            for number, count in enumerate(header.segments):
                own = tokens[first : first + count]
                side = Writing(own, min(header.rows, count))
                bits += self._run(
                    header,
                    side,
                    count,
                    partial(progress, f"coding {number + 1} of {len(header.segments)}"),
                )[1]
                parts.append(pack_segment(side.coder.finish(), self.bytes.decode(own)))
                first += count
        coded = b"".join(parts)
        middle = time.perf_counter()
        if self.decode(coded, "what was coded", progress) != data:
            raise DataError(
                "the file does not come back as it was: this device does not repeat its arithmetic;"
                " nothing was written"
            )
        head = header_bytes(coded)
        weights = sum(p.numel() * 4 for p in self.model.parameters())
        return coded, Coded(
            len(data),
            len(tokens),
            len(coded) - head,
            head,
            float(bits) / 8,
            weights,
            middle - began,
            time.perf_counter() - middle,
        )

    def decode(
        self, coded: bytes, name: str, progress: Progress = lambda what, share: None
    ) -> bytes:
        """The original. name: of the coded file, for errors.

        Raises DataError for a file that is not one, is damaged, or was coded by another model or in
        another environment, which would give other probabilities.
        """
        header, segments = unpack(coded, name)
        if header.model != self.digest:
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
        if header.window != self.config.max_position:
            raise DataError(
                f"{name} is damaged: it says a window of {header.window}, this model has"
                f" {self.config.max_position} positions"
            )
        found = []
        with _exactly(header.threads):
            for number, (count, (code, checksum)) in enumerate(
                zip(header.segments, segments, strict=True)
            ):
                tokens, _ = self._run(
                    header,
                    Reading(code),
                    count,
                    partial(progress, f"decoding {number + 1} of {len(segments)}"),
                )
                found.append(self.bytes.decode(tokens))
                if zlib.crc32(found[-1]) != checksum:
                    raise DataError(
                        f"{name}: segment {number + 1} of {len(segments)} is whole, but something"
                        " else comes out of it: the arithmetic here is not that of where it was"
                        " coded"
                    )
        data = b"".join(found)
        if len(data) != header.size:
            raise DataError(
                f"{name} is damaged: {len(data)} bytes came out of it, it says {header.size}"
            )
        return data

    def _rows(self, tokens: int) -> int:
        """As many as a file of so many tokens is cut into, and the memory takes."""
        model = self.config.model
        # fp32 keys and values of a row
        cache = 8 * model.depth * model.kv_heads_ * model.head_dim_ * self.config.max_position
        return max(min(tokens // ROW_TOKENS, MOST_ROWS, CACHE_BYTES // cache), 1)

    def _run(
        self, header: Header, side: Writing | Reading, count: int, progress: Callable[[float], None]
    ):
        return run(
            self.config,
            self.model,
            self.tokenizer.start_id,
            side,
            count,
            min(header.rows, count),
            header.window,
            progress,
        )


@contextmanager
def _exactly(threads: int) -> Iterator[None]:
    """The same threads for both sides, and no algorithm that depends on the moment."""
    before, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(deterministic)


def read_file(path: Path) -> bytes:
    """Raises DataError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def write_file(path: Path, data: bytes) -> None:
    """Whole or not at all. Raises DataError."""
    try:
        with atomic_write(path, "wb") as file:
            file.write(data)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from error
