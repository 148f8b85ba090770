"""Built-in tasks: prompts whose right continuation is known.

Worked examples stand before a question wherever a model that only continues text could not know
what is asked. Items are a function of (seed, task, tokenizer, texts): the same for every checkpoint
of a run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import DataError, DataPrepError

WORDS = (
    "apple bird blue boat book bread bridge chair child cloud coat corn cup day door dream earth"
    " field fire fish flower friend garden glass gold grass green hand heart hill home horse house"
    " island key king lake lamp leaf letter light line milk moon morning mountain music name night"
    " ocean paper path pen picture plant queen rain red ring river road rock room rope rose salt"
    " sand school sea ship shoe silver sky smoke snow song spring star stone street summer sun"
    " table tea tooth tower town train tree valley voice wall water wind window wing winter wood"
    " word world yard year"
).split()
PAIRS = {"(": ")", "[": "]", "{": "}"}
EXAMPLES = 4  # worked examples before a question
COPIED = 5  # words that are copied
REPEATED = 24  # random tokens that are repeated
BEFORE, LETTERS = 1000, 4  # cloze: characters of text before the word, letters it has at least
WORD = re.compile(rf"(?<=\S) ([^\W\d_]{{{LETTERS},}})(?!\w)")


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        prompt: Token ids, the start token first.
        answer: Token ids, at least one.
        chance: Probability that a guess of the right kind is right; None where it is unknown.
    """

    prompt: list[int]
    answer: list[int]
    chance: float | None = None


@dataclass(frozen=True)
class Material:
    """What items are made from.

    Attributes:
        tokenizer: The model's.
        texts: Held-out documents.
        room: Most tokens of prompt and answer together.
    """

    tokenizer: Tokenizer
    texts: Sequence[str]
    room: int

    def item(self, prompt: str, answer: str, chance: float | None) -> Item | None:
        """Encode an item; None if it does not fit.

        The answer's tokens are those that it has after the prompt, as lm-evaluation-harness divides
        them.
        """
        try:
            before, whole = (
                self.tokenizer.encode(text).tolist() for text in (prompt, prompt + answer)
            )
            after = (
                whole[len(before) :]
                if whole[: len(before)] == before
                else self.tokenizer.encode(answer).tolist()
            )
        except DataPrepError as error:
            raise DataError(f"the tokenizer cannot spell a task: {error}") from None
        return (
            Item([self.tokenizer.start_id, *before], after, chance)
            if after and 1 + len(before) + len(after) <= self.room
            else None
        )


def arithmetic(material: Material, rng: np.random.Generator) -> Item | None:
    """Sums of two numbers of two digits, after worked ones."""
    pairs = rng.integers(10, 100, size=(EXAMPLES + 1, 2)).tolist()
    lines = [f"{a} + {b} = {a + b}\n" for a, b in pairs[:-1]]
    a, b = pairs[-1]
    return material.item("".join(lines) + f"{a} + {b} =", f" {a + b}", 1 / len(range(20, 199)))


def copying(material: Material, rng: np.random.Generator) -> Item | None:
    """Words to repeat in their order, after two lines that do so."""
    lines = [" ".join(rng.choice(WORDS, COPIED, replace=False)) for _ in range(3)]
    return material.item(
        "".join(f"{line} | {line}\n" for line in lines[:-1]) + f"{lines[-1]} |",
        f" {lines[-1]}",
        len(WORDS) ** -COPIED,
    )


def brackets(material: Material, rng: np.random.Generator) -> Item | None:
    """The closing brackets that an open string needs, after worked strings."""
    strings = [_bracket_string(rng) for _ in range(EXAMPLES + 1)]
    opened, closed = strings[-1]
    return material.item(
        "".join(f"{a}{b}\n" for a, b in strings[:-1]) + opened,
        closed,
        len(PAIRS) ** -len(closed.split()),
    )


def _bracket_string(rng: np.random.Generator) -> tuple[str, str]:
    """Draw a string that opens two to four brackets more than it closes, and what closes those.

    All brackets have a space between them.
    """
    more, pairs = int(rng.integers(2, 5)), int(rng.integers(3))
    to_open, to_close = more + pairs, pairs
    waiting: list[str] = []
    written: list[str] = []
    while to_open or to_close:
        if waiting and to_close and (not to_open or rng.random() < 0.4):
            written.append(waiting.pop())
            to_close -= 1
        else:
            written.append(str(rng.choice(list(PAIRS))))
            waiting.append(PAIRS[written[-1]])
            to_open -= 1
    return " ".join(written), "".join(f" {bracket}" for bracket in reversed(waiting))


def induction(material: Material, rng: np.random.Generator) -> Item | None:
    """Random tokens, then the same again up to some position: which is next? (arXiv 2209.11895)."""
    usable = np.flatnonzero(material.tokenizer.token_bytes() > 0)
    count = min(REPEATED, (material.room - 1) // 2, len(usable))
    if count < 2:
        return None
    tokens = rng.choice(usable, count, replace=False).tolist()
    at = int(rng.integers(1, count))
    return Item([material.tokenizer.start_id, *tokens, *tokens[:at]], [tokens[at]], 1 / count)


def cloze(material: Material, rng: np.random.Generator) -> Item | None:
    """A word of a held-out text after the text before it, which is cut on its left to fit."""
    text = material.texts[int(rng.integers(len(material.texts)))]
    matches = [match for match in WORD.finditer(text) if match.start() >= 40]
    if not matches:
        return None
    match = matches[int(rng.integers(len(matches)))]
    for characters in (BEFORE, BEFORE // 2, BEFORE // 4, BEFORE // 8):  # until it fits
        if item := material.item(
            text[max(0, match.start() - characters) : match.start()], f" {match[1]}", None
        ):
            return item
    return None


TASKS: dict[str, Callable[[Material, np.random.Generator], Item | None]] = {
    task.__name__: task for task in (arithmetic, copying, brackets, induction, cloze)
}
TRIES = 20  # for each item: a text may have no word, a prompt no room


def make_items(name: str, material: Material, count: int, seed: int) -> list[Item]:
    """Draw items of a task.

    Args:
        name: Name of the task, of TASKS.
        material: What they are made from.
        count: Number of items; fewer are returned where texts are few.
        seed: Seed of the items.

    Raises:
        DataError: There is no such task, or not one item fits.
    """
    if name not in TASKS:
        raise DataError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    rng = np.random.default_rng([seed, *name.encode()])
    items: list[Item] = []
    for _ in range(TRIES * count):
        if len(items) == count:
            break
        if item := TASKS[name](material, rng):
            items.append(item)
    if not items:
        raise DataError(
            f"no item of task {name} fits the model's {material.room} positions"
            + (", or the texts have no word for it" if name == "cloze" else "")
            + "; choose others with --task"
        )
    return items
