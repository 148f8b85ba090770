"""`nextpt eval --tasks`: what a model can do, at one checkpoint or over all of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launcher.commands.eval_common import deliver, open_with_texts
from launcher.console import out, say, shares_progress, small_table
from nextpt.base.errors import UserError

ITEMS = 200  # of a built-in task


@dataclass(frozen=True)
class Asked:
    """What to do. built_in: names of tasks. harness: names of tasks of lm-evaluation-harness.

    include: a folder with more of them. items: of each task; None: ITEMS of built-in ones, all
    documents of the others.
    """

    built_in: list[str]
    harness: list[str]
    include: Path | None
    items: int | None
    rows: int
    resamples: int
    seed: int


def asked_for(
    all_tasks: bool,
    some: list[str] | None,
    harness: list[str] | None,
    include: Path | None,
    items: int | None,
    rows: int,
    resamples: int,
    seed: int,
) -> Asked | None:
    """None where no task was asked for. Raises UserError."""
    from nextpt.evaluate.tasks.items import TASKS

    if include and not harness:
        raise UserError("--lm-eval-path is for --lm-eval TASK")
    if not (all_tasks or some or harness):
        return None
    if unknown := [name for name in some or [] if name not in TASKS]:
        raise UserError(
            f"there is no task {unknown[0]!r}; there are {', '.join(TASKS)}; those of"
            " lm-evaluation-harness are asked for with --lm-eval"
        )
    names = list(TASKS) if all_tasks else list(dict.fromkeys(some or []))
    return Asked(names, list(dict.fromkeys(harness or [])), include, items, rows, resamples, seed)


def run_tasks(
    path: Path,
    steps: list[int | None],
    data: Path | None,
    text: list[Path] | None,
    asked: Asked,
    json_path: Path | None,
    plot: Path | None,
) -> None:
    """Measure at each step, print, write, draw. Raises UserError."""
    from nextpt.observe.tasks_picture import draw_tasks

    found = [_measure(path, step, data, text, asked) for step in steps]
    if len(found) > 1:
        for table in _curves(found):
            out.print(table)
    _show(found[-1])
    deliver(
        found[-1] | ({"checkpoints": found} if len(found) > 1 else {}),
        [json_path],
        plot,
        partial(draw_tasks, found),
    )


def _measure(
    path: Path, step: int | None, data: Path | None, text: list[Path] | None, asked: Asked
) -> dict[str, Any]:
    from nextpt.evaluate.tasks.harness import run_harness
    from nextpt.evaluate.tasks.measure import heldout_loss, measure_tasks

    source, texts = open_with_texts(path, step, data, text)
    with shares_progress("doing" if step is None else f"step {step}:") as progress:
        tasks = measure_tasks(
            source,
            texts,
            asked.built_in,
            items=asked.items or ITEMS,
            rows=asked.rows,
            seed=asked.seed,
            resamples=asked.resamples,
            progress=progress,
        )
        loss = heldout_loss(source, texts, asked.rows)
    found = {
        ("run" if source.is_run else "model"): str(source.path),
        "step": source.step,
        "seed": asked.seed,
        "loss": loss,
        "tasks": tasks,
    }
    if asked.harness:
        found["harness"] = run_harness(
            source, asked.harness, asked.include, limit=asked.items, rows=asked.rows
        )
    return found


def _pm(figure: dict[str, Any], digits: int) -> str:
    ends = figure["interval"]
    return f"{figure['value']:.{digits}f}" + (
        f" ±{(ends[1] - ends[0]) / 2:.{digits}f}" if ends else ""
    )


def _show(result: dict[str, Any]) -> None:
    at = "" if result["step"] is None else f", step {result['step']}"
    loss = result["loss"]
    if result["tasks"]:
        out.print(
            small_table(
                f"tasks{at}, at {loss['bpb']:.3f} bits/byte of held-out text",
                ["task", "items", "exact", "95 %", "chance", "probability", "nats/token"],
                [
                    [
                        name,
                        f"{f['items']}",
                        f"{f['exact']['value']:.1%}",
                        "{:.1%} to {:.1%}".format(*f["exact"]["interval"]),
                        "" if f["chance"] is None else f"{f['chance']:.1%}",
                        _pm(f["probability"], 3),
                        _pm(f["nats_per_token"], 2),
                    ]
                    for name, f in result["tasks"].items()
                ],
            )
        )
        say(
            "exact: greedy decoding writes the answer. probability: of the whole answer, the mean"
            " over items. nats/token: of the answer's tokens.\n±: half of a 95% interval, bootstrap"
            " of items. chance: a guess that knows which kind of answer is wanted."
        )
    for name, figures in result.get("harness", {}).items():
        say(
            f"lm-evaluation-harness: {name}: "
            + ", ".join(f"{metric} {_pm(figure, 4)}" for metric, figure in figures.items())
        )


def _curves(found: list[dict[str, Any]]) -> list[Any]:
    """A table each for exact match, for the loss of answers, and for the harness's metrics, over the checkpoints."""
    tables = []

    def add(title: str, headings: list[str], cells: Callable[[dict[str, Any]], list[str]]) -> None:
        if headings:
            tables.append(
                small_table(
                    f"{title} at every checkpoint",
                    ["step", "bits/byte", *headings],
                    [[f"{at['step']:,}", f"{at['loss']['bpb']:.3f}", *cells(at)] for at in found],
                )
            )

    names = list(found[-1]["tasks"])
    add(
        "exact match",
        names,
        lambda at: [f"{at['tasks'][name]['exact']['value']:.1%}" for name in names],
    )
    add(
        "nats per answer token",
        names,
        lambda at: [f"{at['tasks'][name]['nats_per_token']['value']:.2f}" for name in names],
    )
    for task, figures in found[-1].get("harness", {}).items():
        add(
            f"lm-evaluation-harness: {task}",
            list(figures),
            lambda at, task=task: [_pm(figure, 4) for figure in at["harness"][task].values()],
        )
    return tables
