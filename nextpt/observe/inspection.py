"""HTML page about one text: tokens coloured by surprisal, with the model's alternatives.

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
from nextpt.checkpoint.state import WEIGHT
from nextpt.evaluate.calibration import Calibration
from nextpt.evaluate.loaded_model import open_model
from nextpt.evaluate.metrics import Metrics
from nextpt.evaluate.texts import validation_texts
from nextpt.evaluate.tokens import TokenScores, next_tokens, score_tokens
from nextpt.generate import text_tokens
from nextpt.generate.stopping import IncrementalDetokenizer
from nextpt.observe.calibration_plot import plot_calibration
from nextpt.observe.report import environment

MAX_SHOWN = 20_000  # tokens on the page, about 8 MB; a browser takes seconds for more
DARKEST = 12.0  # bits, above which the colour is the same: a uniform guess of 4,096 tokens
STEPS = (0, 2, 4, 6, 9, 12)  # bits in the legend


@dataclass(frozen=True)
class Inspection:
    """Predictions of a model for the tokens of a text.

    Attributes:
        model: Which model it was, as `LoadedModel.to_json` returns it.
        source: Name of the text.
        window: Tokens of context.
        stride: Tokens scored per window.
        tokens: One object per token, see `describe_tokens`.
        following: Predictions after the last token.
        metrics: Sums over the text.
        calibration: Calibration on `calibrated_on`.
        calibrated_on: Name of the text that calibration was measured on.
    """

    model: dict[str, Any]
    source: str
    window: int
    stride: int
    tokens: list[dict[str, Any]]
    following: dict[str, Any]
    metrics: Metrics
    calibration: Calibration
    calibrated_on: str

    def as_dict(self) -> dict[str, Any]:
        """Return the content of inspect.json; ranks are counted from 1."""
        return {
            **self.model,
            "source": self.source,
            "window": self.window,
            "stride": self.stride,
            # The end of the text is not scored
            "total": self.metrics.as_dict() | {"bpb_with_eod": None},
            "calibrated_on": self.calibrated_on,
            "calibration": self.calibration.as_dict(),
            "tokens": self.tokens,
            "following": self.following,
        }

    def most_surprising(self, count: int) -> list[tuple[int, dict[str, Any]]]:
        """Return (position from 1, token) of the tokens with the most nats, largest first."""
        indices = sorted(range(len(self.tokens)), key=lambda i: -self.tokens[i]["nats"])[:count]
        return [(index + 1, self.tokens[index]) for index in indices]


def inspect_text(
    run: Path,
    text: str,
    source: str,
    *,
    step: int | None = None,
    weights: str = WEIGHT,
    validation: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[str, float], None] = lambda name, share: None,
) -> Inspection:
    """Inspect a text that is not empty.

    Args:
        run: Run folder or Hugging Face folder.
        text: The text.
        source: Its name.
        step: Step of the checkpoint; None is the newest.
        weights: Weights of the run: "weight", or an average such as "ema-0.999".
        validation: Measure calibration on all held-out documents of the run's dataset.
        device: Device of the model.
        progress: Called with (name, fraction that is done).

    Raises:
        UserError: The text cannot be encoded; the message begins with `source`.
        DataError: There are no held-out documents.
    """
    opened = open_model(run, step, device, decoder_only=True, weights=weights)
    model, tokenizer = opened.decoder, opened.tokenizer
    if validation and not opened.is_run:
        raise DataError(
            f"{run} is a Hugging Face folder, which names no held-out documents; leave"
            " --validation out"
        )
    window = model.max_position
    stride = max(window // 2, 1)
    document = np.array(text_tokens(tokenizer, text, source))
    calibration = Calibration()
    domains = validation_texts(opened.dataset) if validation else {}
    scores = score_tokens(
        model,
        document,
        window=window,
        stride=stride,
        calibration=None if validation else calibration,
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
        "alternatives": describe_alternatives(speller(tokenizer), ids.tolist(), nats.tolist()),
    }
    metrics = Metrics(len(scores.nats), len(text.encode()), float(scores.nats.sum()))
    return Inspection(
        opened.to_json(),
        source,
        window,
        stride,
        describe_tokens(tokenizer, scores),
        following,
        metrics,
        calibration,
        "held-out documents" if validation else source,
    )


def describe_tokens(tokenizer: Tokenizer, scores: TokenScores) -> list[dict[str, Any]]:
    """Return one object per token.

    "text" is the text that the token adds, empty where a later token completes a character.
    """
    detokenizer, spell = IncrementalDetokenizer(tokenizer, [tokenizer.start_id]), speller(tokenizer)
    values = zip(
        scores.ids.tolist(),
        scores.nats.tolist(),
        scores.rank.tolist(),
        scores.entropy.tolist(),
        scores.alternatives.tolist(),
        scores.alternative_nats.tolist(),
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
            "alternatives": describe_alternatives(spell, others, others_nats),
        }
        for token, nats, rank, entropy, others, others_nats in values
    ]


def describe_alternatives(
    spell: Callable[[int], str], tokens: list[int], nats: list[float]
) -> list[dict[str, Any]]:
    """Return tokens with their probabilities."""
    return [
        {"id": token, "token": spell(token), "probability": math.exp(-n)}
        for token, n in zip(tokens, nats, strict=True)
    ]


def speller(tokenizer: Tokenizer) -> Callable[[int], str]:
    """Return the function token -> its text in the middle of a text.

    Bytes that are no character are written as <C3><A9>, other tokens by their name in the
    vocabulary.
    """
    middle, known = [tokenizer.start_id, *tokenizer.encode("a").tolist()], {}
    sizes = tokenizer.token_bytes()

    def name(token: int) -> str:
        spelling = tokenizer.token(token) or f"<{token}>"
        if re.fullmatch("<0x[0-9A-F]{2}>", spelling):
            return spelling
        in_bytes = (
            token < len(sizes)
            and sizes[token] == len(spelling)
            and all(c in BYTE_OF for c in spelling)
        )
        return "".join(f"<{BYTE_OF[c]:02X}>" for c in spelling) if in_bytes else spelling

    def spell(token: int) -> str:
        if token not in known:
            text = "".join(IncrementalDetokenizer(tokenizer, middle).add(token))
            known[token] = text or name(token)
        return known[token]

    return spell


def visible(text: str) -> str:
    """Replace invisible characters by visible marks."""
    return (
        text.replace(" ", "\u2423")
        .replace("\n", "\u23ce")
        .replace("\t", "\u21e5")
        .replace("\r", "\u240d")
    )


def write_inspection(inspection: Inspection, folder: Path) -> None:
    """Write tokens.html, calibration.svg and inspect.json. Raises DataError."""
    plot = plot_calibration(inspection.calibration.as_dict(), inspection.calibrated_on)
    templates = environment()
    templates.filters |= {
        "visible": visible,
        "bits": lambda nats: nats / math.log(2),
        "shade": lambda bits: round(min(bits / DARKEST, 1) * 0.75, 2),
    }
    page = templates.get_template("tokens.html.j2").render(
        inspection=inspection,
        total=inspection.metrics.as_dict(),
        plot=plot,
        shown=inspection.tokens[:MAX_SHOWN],
        surprising=inspection.most_surprising(20),
        steps=STEPS,
        darkest=DARKEST,
        version=nextpt.__version__,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (
            ("tokens.html", page.encode()),
            ("calibration.svg", plot.svg),
            ("inspect.json", canonical_json(inspection.as_dict()).encode()),
        ):
            with atomic_write(folder / name, "wb") as file:
                file.write(content)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}") from error
