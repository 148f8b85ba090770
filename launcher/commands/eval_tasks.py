"""`nextpt eval --tasks`: built-in tasks and lm-evaluation-harness, at one or all checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.eval_common import EvaluationInputs, Json, ResultFiles
from launcher.console import build_table, console, echo, format_half_width, progress_bars
from nextpt.base.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT_ITEMS = 200  # of a built-in task


@dataclass(frozen=True)
class TaskRequest:
    """Tasks to run.

    Attributes:
        built_in: Names of built-in tasks.
        harness: Names of tasks of lm-evaluation-harness.
        include: Folder with further task files for lm-evaluation-harness.
        items: Items per task; None is DEFAULT_ITEMS of built-in ones and all of the others.
        batch_size: Sequences per forward pass.
        resamples: Bootstrap resamples for the intervals.
        seed: Seed of the items and of the bootstrap.
    """

    built_in: list[str]
    harness: list[str]
    include: Path | None
    items: int | None
    batch_size: int
    resamples: int
    seed: int

    @classmethod
    def parse(
        cls,
        all_tasks: bool,
        names: list[str] | None,
        harness: list[str] | None,
        include: Path | None,
        items: int | None,
        *,
        batch_size: int,
        resamples: int,
        seed: int,
    ) -> TaskRequest | None:
        """Build the request from the options of `nextpt eval`; None where no task was named.

        Raises:
            UserError: There is no such task, or include is given without harness.
        """
        from nextpt.evaluate.tasks.items import TASKS

        if include and not harness:
            raise UserError("--lm-eval-path is for --lm-eval TASK")
        if not (all_tasks or names or harness):
            return None
        if unknown := [name for name in names or [] if name not in TASKS]:
            raise UserError(
                f"there is no task {unknown[0]!r}; there are {', '.join(TASKS)}; tasks of"
                " lm-evaluation-harness are named with --lm-eval"
            )
        return cls(
            list(TASKS) if all_tasks else list(dict.fromkeys(names or [])),
            list(dict.fromkeys(harness or [])),
            include,
            items,
            batch_size,
            resamples,
            seed,
        )


def run_tasks(inputs: EvaluationInputs, request: TaskRequest, files: ResultFiles) -> None:
    """Run the tasks at every step, print the tables, write the files. Raises UserError."""
    from nextpt.observe.tasks_plot import plot_tasks

    results = [_measure(inputs, step, request) for step in inputs.steps()]
    if len(results) > 1:
        for table in _curve_tables(results):
            console.print(table)
    _print_result(results[-1])
    checkpoints = {"checkpoints": results} if len(results) > 1 else {}
    files.write(results[-1] | checkpoints, partial(plot_tasks, results))


def _measure(inputs: EvaluationInputs, step: int | None, request: TaskRequest) -> Json:
    from nextpt.evaluate.tasks.harness import run_harness
    from nextpt.evaluate.tasks.measure import measure_tasks, validation_loss

    source, texts = inputs.open(step)
    with progress_bars("running" if step is None else f"step {step}:") as progress:
        tasks = measure_tasks(
            source,
            texts,
            request.built_in,
            items=request.items or DEFAULT_ITEMS,
            batch_size=request.batch_size,
            seed=request.seed,
            resamples=request.resamples,
            progress=progress,
        )
        loss = validation_loss(source, texts, request.batch_size)
    result = {
        **source.to_json(),
        "seed": request.seed,
        "loss": loss,
        "tasks": tasks,
    }
    if request.harness:
        result["harness"] = run_harness(
            source,
            request.harness,
            request.include,
            limit=request.items,
            batch_size=request.batch_size,
        )
    return result


def _format(metric: Json, digits: int) -> str:
    return format_half_width(metric["value"], metric["interval"], digits)


def _print_result(result: Json) -> None:
    step = "" if result["step"] is None else f", step {result['step']}"
    if result["tasks"]:
        rows = [
            [
                name,
                f"{metrics['items']}",
                f"{metrics['exact']['value']:.1%}",
                "{:.1%} to {:.1%}".format(*metrics["exact"]["interval"]),
                "" if metrics["chance"] is None else f"{metrics['chance']:.1%}",
                _format(metrics["probability"], 3),
                _format(metrics["nats_per_token"], 2),
            ]
            for name, metrics in result["tasks"].items()
        ]
        title = f"tasks{step}, at {result['loss']['bpb']:.3f} bits/byte of held-out text"
        headings = ["task", "items", "exact", "95 %", "chance", "probability", "nats/token"]
        console.print(build_table(title, headings, rows))
        echo(
            "exact: greedy decoding gives the answer. probability: of the whole answer, mean over"
            " items. nats/token: of the answer's tokens.\n±: half of a 95 % interval, bootstrap"
            " of items. chance: a random guess among answers of the right kind."
        )
    for name, metrics in result.get("harness", {}).items():
        values = ", ".join(f"{metric} {_format(value, 4)}" for metric, value in metrics.items())
        echo(f"lm-evaluation-harness: {name}: {values}")


def _curve_tables(results: list[Json]) -> list[Table]:
    """Tables over the checkpoints: exact match, answer loss, metrics of lm-evaluation-harness."""
    tables: list[Table] = []

    def add(title: str, headings: list[str], cells: Callable[[Json], list[str]]) -> None:
        if headings:
            rows = [
                [f"{result['step']:,}", f"{result['loss']['bpb']:.3f}", *cells(result)]
                for result in results
            ]
            columns = ["step", "bits/byte", *headings]
            tables.append(build_table(f"{title} at every checkpoint", columns, rows))

    def exact(result: Json) -> list[str]:
        return [f"{result['tasks'][name]['exact']['value']:.1%}" for name in names]

    def answer_loss(result: Json) -> list[str]:
        return [f"{result['tasks'][name]['nats_per_token']['value']:.2f}" for name in names]

    def harness_metrics(result: Json, task: str) -> list[str]:
        return [_format(metric, 4) for metric in result["harness"][task].values()]

    names = list(results[-1]["tasks"])
    add("exact match", names, exact)
    add("nats per answer token", names, answer_loss)
    for task, metrics in results[-1].get("harness", {}).items():
        title = f"lm-evaluation-harness: {task}"
        add(title, list(metrics), partial(harness_metrics, task=task))
    return tables
