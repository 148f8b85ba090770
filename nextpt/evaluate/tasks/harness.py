"""lm-evaluation-harness on a live model, through its own API (lm_eval 0.4.13.

An optional package).
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import norm

from nextpt.base.errors import DataError
from nextpt.evaluate.bootstrap import CONFIDENCE
from nextpt.evaluate.documents import harness_windows, score_targets
from nextpt.evaluate.foreign import ForeignModel
from nextpt.evaluate.heldout import encode_document
from nextpt.evaluate.source import Source
from nextpt.evaluate.tasks.items import Item
from nextpt.evaluate.tasks.measure import score_items
from nextpt.generate.sample import Sampling
from nextpt.generate.text import Wanted, generate

BOOTSTRAP = 1000  # resamples of the harness for metrics without a formula of their error
MAX_NEW_TOKENS = 256  # where a task does not say


def run_harness(
    source: Source,
    names: Sequence[str],
    include: Path | None = None,
    *,
    limit: int | None = None,
    rows: int = 32,
) -> dict[str, dict[str, Any]]:
    """{task: {metric: {"value", "interval"}}}, metrics as the harness names them (`acc,none`).

    Intervals are 95 %, from its standard errors.

    include: folder of further task files (YAML). limit: documents of each task, all unless given.
    rows: requests per pass. Raises DataError where lm_eval is not installed, a task is unknown, or
    its data cannot be had.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise DataError("lm-evaluation-harness is not installed; pip install 'nextpt[harness]'")
    import lm_eval
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise DataError(f"{include} is no folder of task files")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if include is None else str(include))
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise DataError(
            f"lm-evaluation-harness has no task {', '.join(unknown)}; `lm-eval ls tasks` lists"
            " them, and --lm-eval-path adds a folder of your own"
        )
    try:
        found = lm_eval.simple_evaluate(
            model=adapter(source, rows),
            tasks=list(names),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
    except DataError:
        raise
    except Exception as error:  # whatever a task, its data set or the network raises
        raise DataError(
            f"lm-evaluation-harness, {', '.join(names)}: {type(error).__name__}:"
            f" {(str(error).strip().splitlines() or [''])[0]}"
        ) from error
    return {task: _with_intervals(figures) for task, figures in found["results"].items()}


def _with_intervals(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """From {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...}.

    An error may be the text "N/A".
    """
    found = {}
    for key, value in figures.items():
        metric, _, kind = key.partition(",")
        if kind and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = figures.get(f"{metric}_stderr,{kind}")
            reach = (
                norm.ppf((1 + CONFIDENCE) / 2) * error if isinstance(error, (int, float)) else None
            )
            found[key] = {
                "value": float(value),
                "interval": None if reach is None else [float(value - reach), float(value + reach)],
            }
    return found


def adapter(source: Source, rows: int) -> Any:
    """A model as the harness wants it.

    Every context begins with the start token, as every document in training did.
    """
    from lm_eval.api.model import TemplateLM

    class Live(TemplateLM):
        eot_token_id = source.tokenizer.end_id
        prefix_token_id = source.tokenizer.start_id

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            tokens = source.tokenizer.encode(string).tolist()
            return tokens if add_special_tokens is False else [self.prefix_token_id, *tokens]

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            positions = source.config.max_position
            items = [_cut(context, answer, positions) for _, context, answer in requests]
            nats, hits = score_items(source, items, rows)
            return [(-float(n.sum()), bool(h.all())) for n, h in zip(nats, hits, strict=True)]

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            tokens = [
                encode_document(source.tokenizer, request.args[0])[0][:-1] for request in requests
            ]
            windows = harness_windows([len(t) for t in tokens], source.config.max_position)
            return [
                -float(nats.sum())
                for nats in score_targets(source.model, tokens, windows, rows=rows)
            ]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [_continue(source, *request.args) for request in requests]

    return Live()


def _cut(context: list[int], answer: list[int], positions: int) -> Item:
    """The end of a request that is too long: the last token of an answer is no input, and at least one token comes before it."""
    answer = answer[-positions:]
    return Item(context[-max(1, positions + 1 - len(answer)) :], answer)


def _continue(source: Source, context: str, wanted: dict[str, Any]) -> str:
    if isinstance(source.model, ForeignModel):
        raise DataError(
            "this task generates text, which models that the transformers library runs cannot do"
            " here"
        )
    positions, count = source.config.max_position, int(wanted.get("max_gen_toks", MAX_NEW_TOKENS))
    count = min(count, positions - 1)
    prompt = [source.tokenizer.start_id, *source.tokenizer.encode(context).tolist()][
        -(positions - count) :
    ]
    until = wanted.get("until") or []
    stops = tuple(filter(None, [until] if isinstance(until, str) else until))
    temperature = float(wanted.get("temperature", 0.0)) if wanted.get("do_sample") else 0.0
    made = next(
        generate(
            source.config,
            source.model,
            source.tokenizer,
            [prompt],
            Wanted(Sampling(temperature=temperature), count, stops),
        )
    )
    return made.text
