"""Dry run: what a preparation would do and how long it would take, measured on a sample."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from humanize import naturaldelta, naturalsize

from data_prep.format import token_dtype
from data_prep.plan import Plan, Unit, make_plan
from data_prep.prepare import is_current, local_workers
from data_prep.records import Record, read_part
from data_prep.spec import PrepSpec
from data_prep.tokenizer import Tokenizer, convert

SAMPLE_UNITS = 4  # spread over the corpus; the first block of each takes seconds in all
SHARE_OF_TOKENIZER = 0.85  # tokenizer's share of the time of a preparation (docs/data.md)


@dataclass(frozen=True)
class Estimate:
    """Estimate of a preparation.

    Attributes:
        plan: Its plan.
        workers: Number of workers.
        stored: Bytes of all inputs.
        text: Bytes of text, extrapolated from the sample; None where no tokenizer is given, as are:
        tokens: Number of tokens.
        seconds: Wall-clock time.
        disk: Bytes of disk used on the way.
        current: Whether the output exists and was made from the same inputs and settings.
    """

    plan: Plan
    workers: int
    stored: int
    text: int | None
    tokens: int | None
    seconds: float | None
    disk: int | None
    current: bool

    def lines(self) -> list[str]:
        """The estimate as lines of text."""
        spec, units = self.plan.spec, self.plan.units
        files = {part.file for unit in units for part in unit.parts}
        lines = [
            f"{len(files)} files, {naturalsize(self.stored)}, in {len(units)} work units of"
            f" {', '.join(sorted(spec.domains))}"
        ]
        if self.current:
            lines.append(f"{spec.output} is there and was made from them: nothing would be done")
        if self.tokens is None or self.text is None or self.seconds is None or self.disk is None:
            lines.append(
                "the tokenizer would be trained first; its speed is not known yet, so neither is"
                " the time"
            )
        else:
            lines.append(
                f"about {naturalsize(self.text)} of text, {self.tokens:,} tokens,"
                f" {-(-self.tokens // (spec.sequence_length + 1)):,} sequences"
            )
            lines.append(
                f"about {naturaldelta(self.seconds)} with {self.workers} workers"
                f" ({self.tokens / self.seconds / self.workers:,.0f} tokens/s each)"
            )
            free = shutil.disk_usage(_existing(spec.output)).free
            lines.append(
                f"about {naturalsize(self.disk)} of disk beside {spec.output} on the way;"
                f" {naturalsize(free)} are free"
            )
        return [*lines, "nothing was written"]


def dry_run(spec: PrepSpec, workers: int | None = None) -> Estimate:
    """Make the plan and tokenize a sample of the corpus; writes nothing that stays.

    Raises:
        DataPrepError: As the preparation would.
    """
    plan = make_plan(spec)
    count = workers or local_workers(plan).count
    stored = sum(unit.size for unit in plan.units)
    if spec.tokenizer is None:
        return Estimate(plan, count, stored, None, None, None, None, is_current(spec))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        convert(str(spec.tokenizer), path, start=spec.start_token, end=spec.end_token)
        tokenizer = Tokenizer(path, encoder=spec.encoder)
    used = size = tokens = 0
    started = time.perf_counter()
    for unit in plan.units[:: max(len(plan.units) // SAMPLE_UNITS, 1)]:
        for text, bytes_used in _sample(plan, unit):
            used += bytes_used
            size += len(text.encode("utf-8", "replace"))
            tokens += len(tokenizer.encode(text))
    seconds = max(time.perf_counter() - started, 1e-9) / SHARE_OF_TOKENIZER
    scale = stored / max(used, 1)
    # Tokens are stored twice, before and after packing; padding is far below a per cent.
    disk = int(2 * scale * tokens * token_dtype(tokenizer.vocab_size).itemsize)
    return Estimate(
        plan,
        count,
        stored,
        int(scale * size),
        int(scale * tokens),
        scale * seconds / count,
        disk,
        is_current(spec),
    )


def _sample(plan: Plan, unit: Unit) -> Iterator[tuple[str, int]]:
    """Yield (text, bytes of the stored file used since the text before) of a unit's first block."""
    used: list[int] = []
    for record in read_part(unit.parts[0], plan.fields, used.append):
        if len(used) > 1:
            break
        if isinstance(record, Record):
            yield record.text, 0
    yield "", used[0] if used else 0


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)
