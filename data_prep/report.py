"""Report of a preparation: report.json for programs and report.html, one page without network.

Both come from the models below, which the preparation fills. What can be derived from other figures
is derived here and also written to report.json.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Annotated

import humanize
import numpy as np
from jinja2 import Environment
from pydantic import BaseModel, BeforeValidator, ConfigDict, computed_field

from nextpt.base.files import atomic_write, canonical_json
from nextpt.base.pages import page_environment

HISTOGRAM_BINS = 32
# Text of a corpus may hold lone surrogates, which UTF-8 cannot encode.
FromCorpus = Annotated[
    str,
    BeforeValidator(
        lambda text: text.encode("utf-8", "replace").decode() if isinstance(text, str) else text
    ),
]


def length_histogram(lengths: np.ndarray) -> np.ndarray:
    """Histogram of lengths by powers of two.

    Args:
        lengths: Integers of 1 and more.

    Returns:
        int64 [HISTOGRAM_BINS]: entry i counts the lengths in [2^i, 2^(i+1)).
    """
    # exact, where a rounded log2 is not
    exponents = np.frexp(np.asarray(lengths, dtype=np.float64))[1] - 1
    return np.bincount(exponents, minlength=HISTOGRAM_BINS).astype(np.int64)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SplitReport(_Part):
    """One domain of one split.

    Attributes:
        tokens: Targets, the ends of documents included.
        text_tokens: Targets that are text.
        slots: Tokens that the sequences have room for, sequences * (sequence_length + 1).
        pieces: Segments that hold text.
        cut_documents: Documents of more than one piece.
        length_histogram: Documents by their tokens with start and end, in bins of
            length_histogram().
    """

    split: str
    domain: str
    documents: int
    bytes: int
    tokens: int
    text_tokens: int
    sequences: int
    slots: int
    padding_tokens: int
    pieces: int
    cut_documents: int
    length_histogram: list[int]

    @computed_field  # type: ignore[prop-decorator]  # pydantic documents this form
    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text per text token."""
        return ratio(self.bytes, self.text_tokens)

    @computed_field  # type: ignore[prop-decorator]  # pydantic documents this form
    @property
    def packing_efficiency(self) -> float | None:
        """Share of the slots that hold tokens of documents."""
        return ratio(self.slots - self.padding_tokens, self.slots)

    @computed_field  # type: ignore[prop-decorator]  # pydantic documents this form
    @property
    def cut_share(self) -> float | None:
        """Share of the documents that were cut into pieces."""
        return ratio(self.cut_documents, self.documents)


class DuplicateText(_Part):
    """A text that occurs more than once.

    Attributes:
        count: Occurrences.
        bytes: UTF-8 bytes of one copy.
        id: Where the first one is.
        excerpt: Its beginning.
    """

    count: int
    bytes: int
    id: FromCorpus
    excerpt: FromCorpus


class Duplicates(_Part):
    """Exact duplicates.

    Attributes:
        documents: Copies after the first.
        bytes: Their UTF-8 bytes.
        dropped: Whether they were left out.
        top: The most frequent texts.
        duplicate_ids: Documents whose id came before.
    """

    documents: int
    bytes: int
    dropped: bool
    top: list[DuplicateText]
    duplicate_ids: int


class BadRecord(_Part):
    """A record that cannot be used. position: line, row or byte offset."""

    file: str
    position: str
    detail: FromCorpus


class Quarantined(_Part):
    """Records that cannot be used for one reason, with the first few as examples."""

    records: int
    examples: list[BadRecord]


class Throughput(_Part):
    """Throughput of a preparation.

    Attributes:
        workers: Processes that tokenized.
        wall_seconds: Wall-clock time.
        cpu_seconds: CPU time of all processes.
        bytes: UTF-8 bytes of the texts read.
        input_bytes: Bytes of the files as stored, compressed or not.
        tokens: Tokens.
        stage_seconds: CPU seconds of all workers by stage; the tokenizer's own are under
            "tokenize".
    """

    workers: int
    wall_seconds: float
    cpu_seconds: float
    bytes: int
    input_bytes: int
    tokens: int
    stage_seconds: dict[str, float]

    @computed_field  # type: ignore[prop-decorator]  # pydantic documents this form
    @property
    def tokenizer_share(self) -> float | None:
        """Share of the CPU time spent inside the tokenizer."""
        return ratio(self.stage_seconds.get("tokenize", 0.0), self.cpu_seconds)

    @computed_field  # type: ignore[prop-decorator]  # pydantic documents this form
    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of wall-clock time."""
        return ratio(self.tokens, self.wall_seconds)

    @computed_field  # type: ignore[prop-decorator]  # pydantic documents this form
    @property
    def tokens_per_core_second(self) -> float | None:
        """Tokens per second of CPU time."""
        return ratio(self.tokens, self.cpu_seconds)

    @computed_field  # type: ignore[prop-decorator]  # pydantic documents this form
    @property
    def bytes_per_second(self) -> float | None:
        """Bytes of text per second of wall-clock time."""
        return ratio(self.bytes, self.wall_seconds)

    @computed_field  # type: ignore[prop-decorator]  # pydantic documents this form
    @property
    def bytes_per_core_second(self) -> float | None:
        """Bytes of text per second of CPU time."""
        return ratio(self.bytes, self.cpu_seconds)


class TokenizerReport(_Part):
    """The tokenizer. encoder: library that encoded; reason: why that library."""

    name: str
    kind: str
    vocab_size: int
    sha256: str
    encoder: str
    reason: str


class InputReport(_Part):
    """One input of one domain, as given. bytes: of its files as stored."""

    domain: str
    location: str
    files: int
    bytes: int


class PrepReport(_Part):
    """Content of the report.

    filtered and quarantined are by reason; settings are shown as they are, by name.
    """

    name: str
    fingerprint: str
    version: str
    finished: float
    sequence_length: int
    documents_read: int
    splits: list[SplitReport]
    duplicates: Duplicates
    filtered: dict[str, int]
    quarantined: dict[str, Quarantined]
    throughput: Throughput
    tokenizer: TokenizerReport
    settings: dict[str, str | int | float | bool | None]
    inputs: list[InputReport]


def write_report(report: PrepReport, folder: Path) -> None:
    """Write folder/report.json and folder/report.html."""
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(report=report, total=total_of(report.splits))
    )
    with atomic_write(folder / "report.json") as file:
        file.write(canonical_json(report.model_dump(mode="json")))
    with atomic_write(folder / "report.html") as file:
        file.write(page)


def total_of(splits: list[SplitReport]) -> SplitReport:
    """Sum over all domains and splits."""
    counts = (
        "documents",
        "bytes",
        "tokens",
        "text_tokens",
        "sequences",
        "slots",
        "padding_tokens",
        "pieces",
        "cut_documents",
    )
    histogram = np.zeros(HISTOGRAM_BINS, dtype=np.int64)
    for part in splits:
        histogram[: len(part.length_histogram)] += np.array(part.length_histogram, dtype=np.int64)
    sums = {name: sum(getattr(part, name) for part in splits) for name in counts}
    return SplitReport(split="all", domain="all", length_histogram=histogram.tolist(), **sums)


def ratio(part: float, whole: float) -> float | None:
    """Part / whole, or None where there is nothing to divide by."""
    return part / whole if whole else None


def histogram_bars(counts: list[int], width: float, height: float) -> list[dict[str, float | int]]:
    """Bars of a histogram in a plot of width x height, from the first to the last filled bin."""
    filled = [i for i, count in enumerate(counts) if count]
    if not filled:
        return []
    first, last = filled[0], filled[-1]
    step = width / max(last - first + 1, 6)  # a few bars do not fill the plot
    tallest = max(counts)
    return [
        {
            "exponent": i,
            "count": counts[i],
            "x": (i - first) * step,
            "width": step - 2,
            "height": max(height * counts[i] / tallest, 1.0) if counts[i] else 0.0,
        }
        for i in range(first, last + 1)
    ]


def bin_position(length: int, bars: list[dict[str, float | int]]) -> float | None:
    """Where `length` lies on the axis of these bars (logarithmic); None outside of it."""
    bins = math.log2(length) - bars[0]["exponent"]
    return bars[0]["x"] + bins * (bars[0]["width"] + 2) if 0 <= bins <= len(bars) else None


def _short(value: float | None) -> str:
    """Three digits and a prefix: 1.23 M."""
    return "-" if value is None else humanize.metric(value).strip()


def _share(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}%}"


def _power(exponent: int) -> str:
    """2^exponent as people write lengths: 512, 2K, 1M."""
    for shift, unit in ((30, "G"), (20, "M"), (10, "K")):
        if exponent >= shift:
            return f"{2 ** (exponent - shift)}{unit}"
    return str(2**exponent)


@cache  # with it its compiled templates
def _environment() -> Environment:
    environment = page_environment("data_prep")
    environment.filters |= {
        "short": _short,
        "share": _share,
        "power": _power,
        "figure": lambda value: "-" if value is None else f"{value:.2f}",
    }
    environment.globals |= {
        "ratio": ratio,
        "histogram_bars": histogram_bars,
        "bin_position": bin_position,
    }
    return environment
