"""`nextpt eval`: what a model's loss is, on what, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.commands.eval_common import deliver, open_with_texts
from launcher.commands.eval_exposure import run_exposure
from launcher.commands.eval_tasks import asked_for, run_tasks
from launcher.console import (
    compressor_table,
    context_table,
    curve_table,
    evaluation_table,
    frequency_table,
    out,
    say,
    shares_progress,
)
from launcher.registration import add_command
from nextpt.base.errors import UserError

WHAT, HOW, MORE, FREE, TASKS = "What is scored", "How", "More figures", "Free running", "Tasks"


def evaluate(
    run: Annotated[Path | None, typer.Option("--run", help="run folder, such as runs/demo")] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="local Hugging Face folder instead: config.json, *.safetensors, tokenizer.json"
        ),
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="step of the checkpoint; the newest unless given")
    ] = None,
    all_steps: Annotated[
        bool, typer.Option("--all-steps", help="every checkpoint of the run, as a curve")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            help="dataset folder with held-out documents; the run's own unless given",
            rich_help_panel=WHAT,
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 file instead, each as one document; may be repeated", rich_help_panel=WHAT
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="tokens of context; the model's longest unless given", rich_help_panel=HOW
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="tokens scored per window; half of it unless given", rich_help_panel=HOW),
    ] = None,
    rows: Annotated[
        int, typer.Option(min=1, help="windows per forward pass", rich_help_panel=HOW)
    ] = 32,
    ranks: Annotated[
        int, typer.Option(min=1, help="processes that share the documents", rich_help_panel=HOW)
    ] = 1,
    resamples: Annotated[
        int,
        typer.Option(
            min=1, help="of the bootstrap that gives the 95 % intervals", rich_help_panel=HOW
        ),
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="of the bootstrap", rich_help_panel=HOW)] = 0,
    compressors: Annotated[
        bool,
        typer.Option(
            "--compressors", help="zlib, bz2 and xz on the same bytes", rich_help_panel=MORE
        ),
    ] = False,
    harness: Annotated[
        bool,
        typer.Option(
            "--harness",
            help="lm-evaluation-harness's perplexities, by its own windows",
            rich_help_panel=MORE,
        ),
    ] = False,
    exposure_bias: Annotated[
        bool,
        typer.Option(
            "--exposure-bias",
            help="instead: the model's own continuations beside the real ones",
            rich_help_panel=FREE,
        ),
    ] = False,
    prefix: Annotated[
        int | None,
        typer.Option(
            help="tokens of real text before them; a quarter of the model's longest unless given",
            rich_help_panel=FREE,
        ),
    ] = None,
    continuation: Annotated[
        int | None,
        typer.Option(
            help="tokens of each; the rest of the model's longest unless given",
            rich_help_panel=FREE,
        ),
    ] = None,
    stretches: Annotated[
        int, typer.Option(min=1, help="of each domain, at most", rich_help_panel=FREE)
    ] = 128,
    tasks: Annotated[
        bool,
        typer.Option(
            "--tasks",
            help="instead: what the model can do, all built-in tasks",
            rich_help_panel=TASKS,
        ),
    ] = False,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="this one: arithmetic, copying, brackets, induction, cloze; may be repeated",
            rich_help_panel=TASKS,
        ),
    ] = None,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option(
            "--lm-eval",
            help="a task of lm-evaluation-harness; may be repeated",
            rich_help_panel=TASKS,
        ),
    ] = None,
    lm_eval_path: Annotated[
        Path | None,
        typer.Option(
            help="folder of further task files (YAML) for --lm-eval", rich_help_panel=TASKS
        ),
    ] = None,
    items: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="of each task; 200, and all documents of a --lm-eval task, unless given",
            rich_help_panel=TASKS,
        ),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="also write the figures to this file")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="also draw them: a .png, .svg or .pdf")] = None,
    save: Annotated[
        bool, typer.Option("--save", help="also keep them in RUN/evaluation.json, for the report")
    ] = False,
) -> None:
    """Nats, bits, perplexity and bits per byte, per domain, with intervals.

    By context and by token frequency.

    Figures are ratios of sums. bits/byte leaves special tokens out; "ends paid" adds what the ends
    of documents cost.
    """
    from nextpt.evaluate.evaluation import Protocol
    from nextpt.evaluate.exposure import Exposure
    from nextpt.observe.evaluation_picture import check_picture, draw_evaluation

    _check(run, model, step, all_steps, data, text, save)
    if plot:
        check_picture(plot)
    asked = asked_for(tasks, task, lm_eval, lm_eval_path, items, rows, resamples, seed)
    if exposure_bias or asked:
        refuse_others(
            "--exposure-bias" if exposure_bias else "tasks",
            {
                "--all-steps": all_steps and exposure_bias,
                "--window": window is not None,
                "--stride": stride is not None,
                "--ranks": ranks > 1,
                "--compressors": compressors,
                "--harness": harness,
                "--save": save,
                "tasks": exposure_bias and asked,
            },
        )
    if exposure_bias:
        run_exposure(
            run or model,
            step,
            data,
            text,
            Exposure(prefix, continuation, stretches, rows, resamples, seed),
            json_path,
            plot,
        )
        return
    if prefix is not None or continuation is not None:
        raise UserError("--prefix and --continuation are for --exposure-bias")
    steps = _steps(run) if all_steps else [step]
    if asked:
        run_tasks(run or model, steps, data, text, asked, json_path, plot)
        return
    protocol = Protocol(window, stride, rows, ranks, resamples, seed, compressors, harness)
    results = [_evaluate(run or model, at, data, text, protocol) for at in steps]
    result = results[-1]
    if all_steps:
        result = result | {
            "checkpoints": [{key: r[key] for key in ("step", "domains", "total")} for r in results]
        }
        out.print(curve_table(result))
    _show(result)
    deliver(
        result,
        [json_path, run / "evaluation.json" if run and save else None],
        plot,
        partial(draw_evaluation, result),
    )


def _check(
    run: Path | None,
    model: Path | None,
    step: int | None,
    all_steps: bool,
    data: Path | None,
    text: list[Path] | None,
    save: bool,
) -> None:
    if (run is None) == (model is None):
        raise UserError("give either --run, a run folder, or --model, a Hugging Face folder")
    if data and text:
        raise UserError("give either --data or --text; each says what is scored")
    if model and not (data or text):
        raise UserError(
            "--model has no held-out documents of its own: say what to score with --text FILE or"
            " --data FOLDER"
        )
    if model and (all_steps or save or step is not None):
        raise UserError(
            "--step, --all-steps and --save are for a --run; a Hugging Face folder is one model and"
            " has no report"
        )
    if all_steps and step is not None:
        raise UserError("give either --step or --all-steps")


def refuse_others(what: str, given: Mapping[str, object]) -> None:
    """Raise UserError for options that do not go with `what`, name -> whether it was given."""
    if others := [name for name, there in given.items() if there]:
        raise UserError(
            f"{', '.join(others)} cannot be given with {what}: it says nothing of the loss on whole"
            " documents"
        )


def _steps(run: Path) -> list[int]:
    """Steps of the whole checkpoints of a run, lowest first."""
    from nextpt.checkpoint.folders import list_checkpoints, step_of
    from nextpt.evaluate.heldout import open_run

    open_run(run)  # raises where there is none
    return sorted({step_of(found.folder) for found in list_checkpoints(run / "checkpoints")[0]})


def _evaluate(
    path: Path, step: int | None, data: Path | None, text: list[Path] | None, protocol: Any
) -> dict[str, Any]:
    from nextpt.evaluate.evaluation import evaluate_source
    from nextpt.evaluate.frequency import training_counts

    source, texts = open_with_texts(path, step, data, text)
    folder = data or (Path(source.config.data.path) if source.is_run else None)
    with shares_progress("evaluating") as progress:
        return evaluate_source(
            source,
            texts,
            protocol,
            counts=training_counts(folder, source.tokenizer) if folder else None,
            progress=progress,
        )


def _show(result: dict[str, Any]) -> None:
    out.print(evaluation_table(result))
    out.print(context_table(result))
    out.print(frequency_table(result))
    if "compressors" in next(iter(result["domains"].values())):
        out.print(compressor_table(result))
    for domain, f in result.get("harness", {}).items():
        say(
            f"as lm-evaluation-harness: {domain}: word_perplexity {f['word_perplexity']:.4f},"
            f" byte_perplexity {f['byte_perplexity']:.4f}, bits_per_byte {f['bits_per_byte']:.4f}"
        )
    p = result["protocol"]
    say(
        f"\ncontext {p['window']}, stride {p['stride']}; each document by itself:"
        f" {p['start_token']['text']} before it (not scored), {p['end_token']['text']} after it"
        " (only in bits/byte, ends paid)"
    )
    say(
        f"± and brackets: {p['intervals']['confidence']:.0%} intervals, bootstrap of documents,"
        f" {p['intervals']['resamples']} resamples, seed {p['intervals']['seed']}; none where there"
        " is one document"
    )


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    add_command(
        app,
        "eval",
        evaluate,
        example="nextpt eval --run runs/demo --compressors --json eval.json --plot eval.png",
    )
