"""`nextpt eval --tasks`: what a model can do, at one checkpoint or over all of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.console import out, say, shares_progress, small_table
from nextpt.errors import UserError


@dataclass(frozen=True)
class Asked:
    """What to do. built_in: names of tasks. harness: names of tasks of lm-evaluation-harness; include: a folder with more of them."""

    built_in: list[str]
    harness: list[str]
    include: Path | None
    items: int
    rows: int
    resamples: int
    seed: int


def asked_for(all_tasks: bool, some: list[str] | None, harness: list[str] | None, include: Path | None, items: int, rows: int, resamples: int,
              seed: int) -> Asked | None:
    """None where no task was asked for. Raises UserError."""
    from nextpt.evaluate.tasks.items import TASKS

    if include and not harness:
        raise UserError("--lm-eval-path is for --lm-eval TASK")
    if not (all_tasks or some or harness):
        return None
    if unknown := [name for name in some or [] if name not in TASKS]:
        raise UserError(f"there is no task {unknown[0]!r}; there are {', '.join(TASKS)}; those of lm-evaluation-harness are asked for with --lm-eval")
    names = list(TASKS) if all_tasks else list(dict.fromkeys(some or []))
    return Asked(names, list(dict.fromkeys(harness or [])), include, items, rows, resamples, seed)


def run_tasks(path: Path, steps: list[int | None], data: Path | None, text: list[Path] | None, asked: Asked, json_path: Path | None,
              plot: Path | None) -> None:
    """Measure at each step, print, write, draw. Raises UserError."""
    from nextpt.evaluate.heldout import write_result
    from nextpt.observe.tasks_picture import draw_tasks

    found = [_measure(path, step, data, text, asked) for step in steps]
    result = found[-1] | ({"checkpoints": found} if len(found) > 1 else {})
    if len(found) > 1:
        out.print(_curve(found))
    _show(found[-1])
    if json_path:
        write_result(result, json_path)
        say(f"written to {json_path}")
    if plot:
        draw_tasks(found, plot)
        say(f"drawn in {plot}")


def _measure(path: Path, step: int | None, data: Path | None, text: list[Path] | None, asked: Asked) -> dict[str, Any]:
    from nextpt.evaluate.heldout import heldout_texts, text_files
    from nextpt.evaluate.source import open_source
    from nextpt.evaluate.tasks.harness import run_harness
    from nextpt.evaluate.tasks.measure import heldout_loss, measure_tasks
    from nextpt.generate import pick_device

    source = open_source(path, step, pick_device())
    texts = text_files(text) if text else heldout_texts(data or Path(source.config.data.path))
    with shares_progress("doing" if step is None else f"step {step}:") as progress:
        tasks = measure_tasks(source, texts, asked.built_in, items=asked.items, rows=asked.rows, seed=asked.seed, resamples=asked.resamples,
                              progress=progress)
        loss = heldout_loss(source, texts, asked.rows)
    found = {("run" if source.is_run else "model"): str(source.path), "step": source.step, "seed": asked.seed, "loss": loss, "tasks": tasks}
    if asked.harness:
        found["harness"] = run_harness(source, asked.harness, asked.include, limit=asked.items, rows=asked.rows)
    return found


def _pm(figure: dict[str, Any], digits: int) -> str:
    ends = figure["interval"]
    return f"{figure['value']:.{digits}f}" + (f" ±{(ends[1] - ends[0]) / 2:.{digits}f}" if ends else "")


def _show(result: dict[str, Any]) -> None:
    at = "" if result["step"] is None else f", step {result['step']}"
    loss = result["loss"]
    if result["tasks"]:
        out.print(small_table(f"tasks{at}, at {loss['bpb_text']:.3f} bits/byte of held-out text", ["task", "items", "exact", "95 %", "chance", "probability", "nats/token"], [
            [name, f"{f['items']}", f"{f['exact']['value']:.1%}", "{:.1%} to {:.1%}".format(*f["exact"]["interval"]),
             "" if f["chance"] is None else f"{f['chance']:.1%}", _pm(f["probability"], 3), _pm(f["nats_per_token"], 2)]
            for name, f in result["tasks"].items()]))
        say("exact: greedy decoding writes the answer. probability: of the whole answer, the mean over items. nats/token: of the answer's tokens.\n"
            "±: half of a 95% interval, bootstrap of items. chance: a guess that knows which kind of answer is wanted.")
    for name, figures in result.get("harness", {}).items():
        values = {key: value for key, value in figures.items() if "_stderr" not in key}
        errors = {key: figures.get(key.replace(",", "_stderr,")) for key in values}
        say(f"lm-evaluation-harness: {name}: " + ", ".join(f"{key.partition(',')[0]} {value:.4f}" + (f" ±{errors[key]:.4f}" if errors[key] is not None else "")
                                                           for key, value in values.items()))


def _curve(found: list[dict[str, Any]]) -> Any:
    names = list(found[-1]["tasks"])
    return small_table("exact match / nats per answer token at every checkpoint", ["step", "bits/byte", *names], [
        [f"{at['step']:,}", f"{at['loss']['bpb_text']:.3f}",
         *(f"{at['tasks'][n]['exact']['value']:.1%} / {at['tasks'][n]['nats_per_token']['value']:.2f}" for n in names)] for at in found])
