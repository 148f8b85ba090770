"""One HTML page about one text: every token coloured by its surprise, with what the model had expected instead.

The page is one file, opens from disk without network, and runs no script: hovering and clicking are CSS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nextpt
from data_prep.files import atomic_write, canonical_json
from data_prep.tokenizer import Tokenizer
from nextpt.errors import DataError
from nextpt.evaluate.calibration import Calibration
from nextpt.evaluate.metrics import Figures
from nextpt.evaluate.tokens import TokenFigures
from nextpt.generate.stopping import GrowingText
from nextpt.observe.calibration_picture import calibration_picture
from nextpt.observe.report import environment

MOST_SHOWN = 20_000  # tokens on the page, about 8 MB; a browser takes seconds for more
DARKEST = 12.0  # bits, from which on the colour stays: chance among 4,096 tokens
STEPS = (0, 2, 4, 6, 9, 12)  # bits in the legend


@dataclass(frozen=True)
class Inspection:
    """A text as a model saw it. source: where the text is from. tokens: of the text, as `rows` makes them. following: what
    the model expects after it. figures: sums over the text. calibration: of `calibrated_on`."""

    run: Path
    step: int
    source: str
    window: int
    stride: int
    tokens: list[dict[str, Any]]
    following: dict[str, Any]
    figures: Figures
    calibration: Calibration
    calibrated_on: str

    def as_dict(self) -> dict[str, Any]:
        """The form of inspect.json. Nats and probabilities, ranks from 1."""
        return {"run": str(self.run), "step": self.step, "source": self.source, "window": self.window, "stride": self.stride,
                "total": self.figures.as_dict(), "calibrated_on": self.calibrated_on, "calibration": self.calibration.as_dict(),
                "tokens": self.tokens, "following": self.following}

    def most_surprising(self, count: int) -> list[tuple[int, dict[str, Any]]]:
        """(place from 1, token) of those with the most nats, first the largest."""
        places = sorted(range(len(self.tokens)), key=lambda i: -self.tokens[i]["nats"])[:count]
        return [(place + 1, self.tokens[place]) for place in places]


def rows(tokenizer: Tokenizer, found: TokenFigures) -> list[dict[str, Any]]:
    """One object per token. text: what it adds to the text; empty where a later token completes a character."""
    growing, spell = GrowingText(tokenizer, [tokenizer.start_id]), speller(tokenizer)
    values = zip(found.ids.tolist(), found.nats.tolist(), found.rank.tolist(), found.entropy.tolist(), found.alternatives.tolist(),
                 found.alternative_nats.tolist(), strict=True)
    return [{"id": token, "token": spell(token), "text": "".join(growing.add(token)), "nats": nats, "probability": math.exp(-nats),
             "rank": rank, "entropy": entropy, "alternatives": expected(spell, others, others_nats)}
            for token, nats, rank, entropy, others, others_nats in values]


def expected(spell: Callable[[int], str], tokens: list[int], nats: list[float]) -> list[dict[str, Any]]:
    """Tokens that the model expects, with their probabilities."""
    return [{"id": token, "token": spell(token), "probability": math.exp(-n)} for token, n in zip(tokens, nats, strict=True)]


def speller(tokenizer: Tokenizer) -> Callable[[int], str]:
    """What a token reads as in the middle of a text; its name in the vocabulary where it is special or a part of a character."""
    middle, known = [tokenizer.start_id, *tokenizer.encode("a").tolist()], {}

    def spell(token: int) -> str:
        if token not in known:
            text = "".join(GrowingText(tokenizer, middle).add(token))
            known[token] = text or tokenizer.token(token) or f"<{token}>"
        return known[token]

    return spell


def visible(text: str) -> str:
    """With marks for what cannot be seen."""
    return text.replace(" ", "\u2423").replace("\n", "\u23ce").replace("\t", "\u21e5").replace("\r", "\u240d")


def write_inspection(found: Inspection, folder: Path) -> None:
    """Write tokens.html, calibration.svg and inspect.json. Raises DataError where that cannot be."""
    picture = calibration_picture(found.calibration.as_dict(), found.calibrated_on)
    made = environment()
    made.filters |= {"visible": visible, "bits": lambda nats: nats / math.log(2), "shade": lambda bits: round(min(bits / DARKEST, 1) * 0.75, 2)}
    page = made.get_template("tokens.html.j2").render(
        found=found, total=found.figures.as_dict(), picture=picture, shown=found.tokens[:MOST_SHOWN], surprising=found.most_surprising(20),
        steps=STEPS, darkest=DARKEST, version=nextpt.__version__)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (("tokens.html", page.encode()), ("calibration.svg", picture.svg), ("inspect.json", canonical_json(found.as_dict()).encode())):
            with atomic_write(folder / name, "wb") as file:
                file.write(content)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}") from error
