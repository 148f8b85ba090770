"""lm-evaluation-harness on a loaded model, through its own API (lm_eval 0.4.13, optional)."""

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
from nextpt.evaluate.loaded_model import LoadedModel
from nextpt.evaluate.tasks.items import Item
from nextpt.evaluate.tasks.measure import score_items
from nextpt.evaluate.texts import encode_document
from nextpt.generate.sample import Sampling
from nextpt.generate.text import GenerationConfig, generate

BOOTSTRAP = 1000  # resamples of the harness for metrics without a formula of their error
MAX_NEW_TOKENS = 256  # where a task gives no limit


def run_harness(
    loaded: LoadedModel,
    names: Sequence[str],
    include: Path | None = None,
    *,
    limit: int | None = None,
    batch_size: int = 32,
) -> dict[str, dict[str, Any]]:
    """Run tasks of lm-evaluation-harness.

    Args:
        loaded: The model.
        names: Names of the tasks.
        include: Folder of further task files (YAML).
        limit: Documents of each task; all by default.
        batch_size: Requests per forward pass.

    Returns:
        Task -> metric, as the harness names it (`acc,none`) -> "value" and its 95 % "interval",
        from the harness's standard errors.

    Raises:
        DataError: lm_eval is not installed, a task is unknown, or its data cannot be had.
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
        evaluated = lm_eval.simple_evaluate(
            model=adapter(loaded, batch_size),
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
    return {task: _with_intervals(metrics) for task, metrics in evaluated["results"].items()}


def _with_intervals(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Convert {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...}.

    A standard error may be the text "N/A".
    """
    converted = {}
    for key, value in metrics.items():
        metric, _, kind = key.partition(",")
        if kind and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error, interval = metrics.get(f"{metric}_stderr,{kind}"), None
            if isinstance(error, (int, float)):
                half = norm.ppf((1 + CONFIDENCE) / 2) * error
                interval = [float(value - half), float(value + half)]
            converted[key] = {"value": float(value), "interval": interval}
    return converted


def adapter(loaded: LoadedModel, batch_size: int) -> Any:
    """Wrap a model in the interface of the harness.

    Every context begins with the start token, as every document in training did.
    """
    from lm_eval.api.model import TemplateLM

    class LoadedLM(TemplateLM):  # type: ignore[misc] # lm_eval ships no types
        eot_token_id = loaded.tokenizer.end_id
        prefix_token_id = loaded.tokenizer.start_id

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            tokens: list[int] = loaded.tokenizer.encode(string).tolist()
            return tokens if add_special_tokens is False else [self.prefix_token_id, *tokens]

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            positions = loaded.model.max_position
            items = [_truncate(context, answer, positions) for _, context, answer in requests]
            nats, hits = score_items(loaded, items, batch_size)
            return [(-float(n.sum()), bool(h.all())) for n, h in zip(nats, hits, strict=True)]

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            tokens = [
                encode_document(loaded.tokenizer, request.args[0])[0][:-1] for request in requests
            ]
            windows = harness_windows([len(t) for t in tokens], loaded.model.max_position)
            scores = score_targets(loaded.model, tokens, windows, batch_size=batch_size)
            return [-float(nats.sum()) for nats in scores]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [_continue(loaded, *request.args) for request in requests]

    return LoadedLM()


def _truncate(context: list[int], answer: list[int], positions: int) -> Item:
    """Keep the end of a request that is too long.

    The last token of an answer is no input, and at least one token comes before the answer.
    """
    answer = answer[-positions:]
    return Item(context[-max(1, positions + 1 - len(answer)) :], answer)


def _continue(loaded: LoadedModel, context: str, request: dict[str, Any]) -> str:
    """Generate the text that a request of the harness asks for."""
    model, tokenizer = loaded.decoder, loaded.tokenizer
    count = int(request.get("max_gen_toks", MAX_NEW_TOKENS))
    count = min(count, model.max_position - 1)
    tokens = [tokenizer.start_id, *tokenizer.encode(context).tolist()]
    prompt = tokens[-(model.max_position - count) :]
    until = request.get("until") or []
    stops = tuple(filter(None, [until] if isinstance(until, str) else until))
    temperature = float(request.get("temperature", 0.0)) if request.get("do_sample") else 0.0
    config = GenerationConfig(Sampling(temperature=temperature), count, stops)
    return next(generate(model, tokenizer, [prompt], config)).text
