"""One HTML page about one text: every token coloured by its surprise, with what the model had expected instead.

The page is one file, opens from disk without network, and runs no script: hovering and clicking are
CSS.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nextpt
from data_prep.tokenizer import Tokenizer
from data_prep.tokenizer.description import BYTE_OF
from nextpt.base.errors import DataError
from nextpt.base.files import atomic_write, canonical_json
from nextpt.evaluate.calibration import Calibration
from nextpt.evaluate.heldout import heldout_texts
from nextpt.evaluate.loaded_model import open_model
from nextpt.evaluate.metrics import Metrics
from nextpt.evaluate.tokens import TokenScores, next_tokens, score_tokens
from nextpt.generate import text_tokens
from nextpt.generate.stopping import IncrementalDetokenizer
from nextpt.observe.calibration_plot import plot_calibration
from nextpt.observe.report import environment

MOST_SHOWN = 20_000  # tokens on the page, about 8 MB; a browser takes seconds for more
DARKEST = 12.0  # bits, from which on the colour stays: chance among 4,096 tokens
STEPS = (0, 2, 4, 6, 9, 12)  # bits in the legend


@dataclass(frozen=True)
class Inspection:
    """A text as a model saw it. source: where the text is from. tokens: of the text, as `rows` makes them. following: what the model expects after it. metrics: sums over the text. calibration: of `calibrated_on`."""

    run: Path
    step: int | None  # of a run
    source: str
    window: int
    stride: int
    tokens: list[dict[str, Any]]
    following: dict[str, Any]
    metrics: Metrics
    calibration: Calibration
    calibrated_on: str

    def as_dict(self) -> dict[str, Any]:
        """The form of inspect.json. Nats and probabilities, ranks from 1."""
        return {
            "run": str(self.run),
            "step": self.step,
            "source": self.source,
            "window": self.window,
            "stride": self.stride,
            "total": self.metrics.as_dict(),
            "calibrated_on": self.calibrated_on,
            "calibration": self.calibration.as_dict(),
            "tokens": self.tokens,
            "following": self.following,
        }

    def most_surprising(self, count: int) -> list[tuple[int, dict[str, Any]]]:
        """(place from 1, token) of those with the most nats, first the largest."""
        places = sorted(range(len(self.tokens)), key=lambda i: -self.tokens[i]["nats"])[:count]
        return [(place + 1, self.tokens[place]) for place in places]


def inspect_text(
    run: Path,
    text: str,
    source: str,
    *,
    step: int | None = None,
    heldout: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[str, float], None] = lambda name, share: None,
) -> Inspection:
    """A text, not empty, as the newest checkpoint of a run sees it, or that of a step.

    heldout: calibration on all held-out documents of the run's dataset, not on the text. progress:
    hears (what, share of it that is done). Raises UserError, which begins with `source`, for a text
    that cannot be encoded, and DataError for held-out documents that are not there.
    """
    opened = open_model(run, step, device, decoder_only=True)
    model, tokenizer, at = opened.decoder, opened.tokenizer, opened.step
    if heldout and not opened.is_run:
        raise DataError(
            f"{run} is a Hugging Face folder, which names no held-out documents; leave"
            " --heldout out"
        )
    window = model.max_position
    stride = max(window // 2, 1)
    document = np.array(text_tokens(tokenizer, text, source))
    calibration = Calibration()
    domains = heldout_texts(opened.dataset) if heldout else {}
    found = score_tokens(
        model,
        document,
        window=window,
        stride=stride,
        calibration=None if heldout else calibration,
        progress=lambda share: progress(source, share),
    )
    for domain, texts in domains.items():
        for number, some in enumerate(texts, start=1):
            encoded = np.array(text_tokens(tokenizer, some, f"a held-out document of {domain}"))
            if len(encoded) > 1:
                score_tokens(model, encoded, window=window, stride=stride, calibration=calibration)
            progress(f"{domain}, held out", number / len(texts))
    if not calibration.positions:
        raise DataError(f"the held-out documents of {opened.data} hold no text to calibrate on")
    entropy, ids, nats = next_tokens(model, document, window=window)
    following = {
        "entropy": entropy,
        "alternatives": expected(speller(tokenizer), ids.tolist(), nats.tolist()),
    }
    metrics = Metrics(len(found.nats), len(text.encode()), float(found.nats.sum()))
    return Inspection(
        run,
        at,
        source,
        window,
        stride,
        rows(tokenizer, found),
        following,
        metrics,
        calibration,
        "held-out documents" if heldout else source,
    )


def rows(tokenizer: Tokenizer, found: TokenScores) -> list[dict[str, Any]]:
    """One object per token. text: what it adds to the text.

    Empty where a later token completes a character.
    """
    detokenizer, spell = IncrementalDetokenizer(tokenizer, [tokenizer.start_id]), speller(tokenizer)
    values = zip(
        found.ids.tolist(),
        found.nats.tolist(),
        found.rank.tolist(),
        found.entropy.tolist(),
        found.alternatives.tolist(),
        found.alternative_nats.tolist(),
        strict=True,
    )
    return [
        {
            "id": token,
            "token": spell(token),
            "text": "".join(detokenizer.add(token)),
            "nats": nats,
            "probability": math.exp(-nats),
            "rank": rank,
            "entropy": entropy,
            "alternatives": expected(spell, others, others_nats),
        }
        for token, nats, rank, entropy, others, others_nats in values
    ]


def expected(
    spell: Callable[[int], str], tokens: list[int], nats: list[float]
) -> list[dict[str, Any]]:
    """Tokens that the model expects, with their probabilities."""
    return [
        {"id": token, "token": spell(token), "probability": math.exp(-n)}
        for token, n in zip(tokens, nats, strict=True)
    ]


def speller(tokenizer: Tokenizer) -> Callable[[int], str]:
    """What a token reads as in the middle of a text.

    <C3><A9> for bytes that are no character; else its name in the vocabulary.
    """
    middle, known = [tokenizer.start_id, *tokenizer.encode("a").tolist()], {}
    sizes = tokenizer.token_bytes()

    def name(token: int) -> str:
        found = tokenizer.token(token) or f"<{token}>"
        if re.fullmatch("<0x[0-9A-F]{2}>", found):
            return found
        in_bytes = (
            token < len(sizes) and sizes[token] == len(found) and all(c in BYTE_OF for c in found)
        )
        return "".join(f"<{BYTE_OF[c]:02X}>" for c in found) if in_bytes else found

    def spell(token: int) -> str:
        if token not in known:
            text = "".join(IncrementalDetokenizer(tokenizer, middle).add(token))
            known[token] = text or name(token)
        return known[token]

    return spell


def visible(text: str) -> str:
    """With marks for what cannot be seen."""
    return (
        text.replace(" ", "\u2423")
        .replace("\n", "\u23ce")
        .replace("\t", "\u21e5")
        .replace("\r", "\u240d")
    )


def write_inspection(found: Inspection, folder: Path) -> None:
    """Write tokens.html, calibration.svg and inspect.json.

    Raises DataError where that cannot be.
    """
    picture = plot_calibration(found.calibration.as_dict(), found.calibrated_on)
    made = environment()
    made.filters |= {
        "visible": visible,
        "bits": lambda nats: nats / math.log(2),
        "shade": lambda bits: round(min(bits / DARKEST, 1) * 0.75, 2),
    }
    page = made.get_template("tokens.html.j2").render(
        found=found,
        total=found.metrics.as_dict(),
        picture=picture,
        shown=found.tokens[:MOST_SHOWN],
        surprising=found.most_surprising(20),
        steps=STEPS,
        darkest=DARKEST,
        version=nextpt.__version__,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (
            ("tokens.html", page.encode()),
            ("calibration.svg", picture.svg),
            ("inspect.json", canonical_json(found.as_dict()).encode()),
        ):
            with atomic_write(folder / name, "wb") as file:
                file.write(content)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}") from error
