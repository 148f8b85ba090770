"""`nextpt eval`: loss of a model on held-out text, with confidence intervals."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.commands.eval_common import EvaluationInputs, ResultFiles, refuse_options
from launcher.commands.eval_exposure import run_exposure
from launcher.commands.eval_tasks import TaskRequest, run_tasks
from launcher.console import console, echo, progress_bars
from launcher.options import JsonFile, PlotFile, Step, TextField, Weights
from launcher.registration import add_command
from nextpt.base.errors import UserError

if TYPE_CHECKING:
    from nextpt.evaluate.evaluation import EvaluationProtocol

INPUT, METHOD, ADDITIONS = "What is evaluated", "Method", "Additional metrics"
EXPOSURE, TASKS = "Exposure bias", "Tasks"

Run = Annotated[Path | None, typer.Option("--run", help="run folder, such as runs/demo")]
Model = Annotated[
    Path | None,
    typer.Option(
        help="local Hugging Face folder instead: config.json, *.safetensors, tokenizer.json"
    ),
]
AllSteps = Annotated[
    bool, typer.Option("--all-steps", help="evaluate every checkpoint of the run, as a curve")
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="dataset folder with held-out documents [default: the run's]", rich_help_panel=INPUT
    ),
]
Text = Annotated[
    list[Path] | None,
    typer.Option(
        help=(
            "file instead: the records of .jsonl or .parquet, or UTF-8 text as one document; may be"
            " repeated"
        ),
        rich_help_panel=INPUT,
    ),
]
Window = Annotated[
    int | None,
    typer.Option(help="tokens of context [default: the model's maximum]", rich_help_panel=METHOD),
]
Stride = Annotated[
    int | None,
    typer.Option(
        help="tokens scored per window [default: half the window]", rich_help_panel=METHOD
    ),
]
BatchSize = Annotated[
    int, typer.Option(min=1, help="sequences per forward pass", rich_help_panel=METHOD)
]
EvalRanks = Annotated[
    int,
    typer.Option(min=1, help="processes among which documents are divided", rich_help_panel=METHOD),
]
Resamples = Annotated[
    int,
    typer.Option(min=1, help="bootstrap resamples for the 95 % intervals", rich_help_panel=METHOD),
]
BootstrapSeed = Annotated[
    int, typer.Option(min=0, help="seed of the bootstrap", rich_help_panel=METHOD)
]
Compressors = Annotated[
    bool,
    typer.Option(
        "--compressors", help="zlib, bz2 and xz on the same bytes", rich_help_panel=ADDITIONS
    ),
]
Harness = Annotated[
    bool,
    typer.Option(
        "--harness",
        help="the perplexities of lm-evaluation-harness, with its windows",
        rich_help_panel=ADDITIONS,
    ),
]
ExposureBias = Annotated[
    bool,
    typer.Option(
        "--exposure-bias",
        help="compare the model's own continuations with real text, instead of the evaluation",
        rich_help_panel=EXPOSURE,
    ),
]
Prefix = Annotated[
    int | None,
    typer.Option(
        help="tokens of real text before a continuation [default: a quarter of the maximum]",
        rich_help_panel=EXPOSURE,
    ),
]
Continuation = Annotated[
    int | None,
    typer.Option(
        help="tokens of a continuation [default: the rest of the maximum]",
        rich_help_panel=EXPOSURE,
    ),
]
Continuations = Annotated[
    int,
    typer.Option(
        min=1, help="maximum number of continuations per domain", rich_help_panel=EXPOSURE
    ),
]
AllTasks = Annotated[
    bool,
    typer.Option(
        "--tasks", help="all built-in tasks, instead of the evaluation", rich_help_panel=TASKS
    ),
]
Task = Annotated[
    list[str] | None,
    typer.Option(
        help="one task: arithmetic, copying, brackets, induction, cloze; may be repeated",
        rich_help_panel=TASKS,
    ),
]
LmEval = Annotated[
    list[str] | None,
    typer.Option(
        "--lm-eval", help="task of lm-evaluation-harness; may be repeated", rich_help_panel=TASKS
    ),
]
LmEvalPath = Annotated[
    Path | None,
    typer.Option(help="folder of further --lm-eval task files (YAML)", rich_help_panel=TASKS),
]
Items = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="items per task [default: 200; all of a --lm-eval task]",
        rich_help_panel=TASKS,
    ),
]
Save = Annotated[
    bool, typer.Option("--save", help="also write RUN/evaluation.json, which the report shows")
]


def evaluate(
    run: Run = None,
    model: Model = None,
    step: Step = None,
    all_steps: AllSteps = False,
    weights: Weights = "weight",
    data: Data = None,
    text: Text = None,
    text_field: TextField = "text",
    window: Window = None,
    stride: Stride = None,
    batch_size: BatchSize = 32,
    ranks: EvalRanks = 1,
    resamples: Resamples = 1000,
    seed: BootstrapSeed = 0,
    compressors: Compressors = False,
    harness: Harness = False,
    exposure_bias: ExposureBias = False,
    prefix: Prefix = None,
    continuation: Continuation = None,
    continuations: Continuations = 128,
    tasks: AllTasks = False,
    task: Task = None,
    lm_eval: LmEval = None,
    lm_eval_path: LmEvalPath = None,
    items: Items = None,
    json_path: JsonFile = None,
    plot: PlotFile = None,
    save: Save = False,
) -> None:
    """Evaluate a model: nats, bits, perplexity and bits per byte per domain, with intervals.

    Also by context and by token frequency. Metrics are ratios of sums. bits/byte leaves special
    tokens out; "with EOD" includes the cost of the end-of-document tokens.
    """
    from nextpt.base.plots import check_plot_path
    from nextpt.evaluate.evaluation import EvaluationProtocol
    from nextpt.evaluate.exposure import ExposureProtocol

    inputs = EvaluationInputs(run, model, step, all_steps, data, text, weights, text_field)
    if save and run is None:
        raise UserError("--save needs a --run; a Hugging Face folder has no report")
    if plot:
        check_plot_path(plot)
    request = TaskRequest.parse(
        tasks,
        task,
        lm_eval,
        lm_eval_path,
        items,
        batch_size=batch_size,
        resamples=resamples,
        seed=seed,
    )
    options_of_the_loss = {
        "--window": window is not None,
        "--stride": stride is not None,
        "--ranks": ranks > 1,
        "--compressors": compressors,
        "--harness": harness,
        "--save": save,
    }
    if exposure_bias:
        options = {"--all-steps": all_steps, "tasks": bool(request)} | options_of_the_loss
        refuse_options("--exposure-bias", options)
        exposure = ExposureProtocol(
            prefix, continuation, continuations, batch_size, resamples, seed
        )
        run_exposure(inputs, exposure, ResultFiles([json_path], plot))
    elif prefix is not None or continuation is not None:
        raise UserError("--prefix and --continuation are for --exposure-bias")
    elif request:
        refuse_options("tasks", options_of_the_loss)
        run_tasks(inputs, request, ResultFiles([json_path], plot))
    else:
        protocol = EvaluationProtocol(
            window, stride, batch_size, ranks, resamples, seed, compressors, harness
        )
        saved = run / "evaluation.json" if run and save else None
        run_evaluation(inputs, protocol, ResultFiles([json_path, saved], plot))


def run_evaluation(
    inputs: EvaluationInputs, protocol: EvaluationProtocol, files: ResultFiles
) -> None:
    """Evaluate at every step of the inputs, print the tables, write the files."""
    from launcher.tables.evaluation import curve_table
    from nextpt.observe.evaluation_plot import plot_evaluation

    results = [_evaluate(inputs, step, protocol) for step in inputs.steps()]
    result = results[-1]
    if inputs.all_steps:
        keys = ("step", "domains", "total")
        result = result | {"checkpoints": [{key: r[key] for key in keys} for r in results]}
        console.print(curve_table(result))
    _print_result(result)
    files.write(result, partial(plot_evaluation, result))


def _evaluate(
    inputs: EvaluationInputs, step: int | None, protocol: EvaluationProtocol
) -> dict[str, Any]:
    from nextpt.evaluate.evaluation import evaluate_model
    from nextpt.evaluate.frequency import training_counts

    source, texts = inputs.open(step)
    folder = inputs.data or source.data
    counts = training_counts(folder, source.tokenizer) if folder else None
    with progress_bars("evaluating") as progress:
        return evaluate_model(source, texts, protocol, counts=counts, progress=progress)


def _print_result(result: dict[str, Any]) -> None:
    from launcher.tables.evaluation import (
        compressor_table,
        context_table,
        evaluation_table,
        frequency_table,
    )

    console.print(evaluation_table(result))
    console.print(context_table(result))
    console.print(frequency_table(result))
    if "compressors" in next(iter(result["domains"].values())):
        console.print(compressor_table(result))
    for domain, metrics in result.get("harness", {}).items():
        echo(
            f"lm-evaluation-harness: {domain}: word_perplexity {metrics['word_perplexity']:.4f},"
            f" byte_perplexity {metrics['byte_perplexity']:.4f},"
            f" bits_per_byte {metrics['bits_per_byte']:.4f}"
        )
    protocol = result["protocol"]
    intervals = protocol["intervals"]
    echo(
        f"\ncontext {protocol['window']}, stride {protocol['stride']}; each document by itself:"
        f" {protocol['start_token']['text']} before it (not scored),"
        f" {protocol['end_token']['text']} after it (only in bits/byte with EOD)"
    )
    echo(
        f"± and brackets: {intervals['confidence']:.0%} intervals, bootstrap of documents,"
        f" {intervals['resamples']} resamples, seed {intervals['seed']}; no interval for a single"
        " document"
    )


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    add_command(
        app,
        "eval",
        evaluate,
        example="nextpt eval --run runs/demo --compressors --json eval.json --plot eval.png",
        deprecated={"--rows": "--batch-size", "--stretches": "--continuations"},
    )
