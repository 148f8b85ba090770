"""Demo: corpus, shards, training, resume, evaluation, samples and report on this CPU.

`make demo` runs it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from data_prep.prepare import is_current, prepare, summary_table
from data_prep.spec import PrepSpec
from data_prep.stdlib_corpus import collect
from launcher.console import console, echo, progress_bars
from launcher.jobs.local import start_training
from launcher.tables.evaluation import compressor_table, evaluation_table
from nextpt.base.errors import UserError
from nextpt.base.pages import readable_duration
from nextpt.checkpoint.folders import folder_of_step, steps
from nextpt.config import Config, load_config
from nextpt.evaluate.evaluation import EvaluationProtocol, evaluate_model
from nextpt.evaluate.loaded_model import open_model
from nextpt.evaluate.texts import validation_texts, write_result
from nextpt.events import read_events
from nextpt.generate import GenerationConfig, Sampling, generate, prompt_tokens
from nextpt.generate.records import sample_record, save_samples
from nextpt.observe.report import default_output, write_report
from nextpt.observe.run_record import read_runs

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
RANKS = 2
RESUMED_STEPS = 20  # enough for four logged losses
# A stride of a quarter: three quarters of the context before nearly every token, at four times the
# work of none.
STRIDES_PER_WINDOW = 4
PROMPTS = {"code": "def read_config(path):\n", "prose": "This module provides", "empty": ""}
STAGES = (
    "the standard library of this Python as a corpus",
    "tokenizer, packing, shards",
    f"training on {RANKS} CPU ranks: deepspeed launcher/run.py --config configs/demo.yaml",
    "resume: the middle checkpoint, continued, against the uninterrupted run",
    "evaluation on held-out documents",
    "three samples",
    "the report",
)


def main() -> None:
    """Run all stages. Raises UserError at the first that fails."""
    # The demo is the same everywhere, and shows the CPU path
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    config = load_config(CONFIG)
    print_earlier_run(config)
    stage(1)
    corpus = Path(config.data.path).parent / "corpus"
    with console.status("reading sources"):
        collected = collect(corpus)
    for domain, count in collected.documents.items():
        echo(f"{domain}: {count:,} documents, {collected.bytes[domain]:,} bytes")
    stage(2)
    spec = PrepSpec(
        domains={d: corpus / f"{d}.jsonl" for d in collected.documents},
        output=Path(config.data.path),
        sequence_length=config.data.sequence_length,
        vocab_size=config.model.vocab_size,
    )
    current = is_current(spec)
    if not current and spec.output.exists() and steps(config.run_dir / "checkpoints"):
        raise UserError(
            f"{spec.output}, on which {config.run_dir} was trained, is of another corpus (another"
            f" Python) or of another nextpt; start again from nothing: {start_again(config)}"
        )
    console.print(summary_table(prepare(spec, overwrite=not current, console=console)))
    stage(3)
    train(config)
    stage(4)
    proved = prove_resume(config)
    stage(5)
    result = evaluate(config)
    stage(6)
    sample(config)
    stage(7)
    page = default_output([config.run_dir])
    write_report([config.run_dir], page)
    echo(f"written to {page}; open it in a browser")
    summary(config, result, proved, page)


def stage(number: int) -> None:
    """Print the heading of a stage."""
    echo(f"\n=== {number}/{len(STAGES)}  {STAGES[number - 1]}")


def print_earlier_run(config: Config) -> None:
    """Print what an earlier demo left, how it is used, and how to start again."""
    saved = steps(config.run_dir / "checkpoints")
    if not saved:
        return
    if saved[0] >= config.last_step:
        echo(
            f"The run {config.run_dir} exists and is complete (step {saved[0]}): it is not trained"
            " again, but checked, evaluated and sampled again."
        )
    else:
        echo(
            f"The run {config.run_dir} exists up to step {saved[0]} of {config.last_step}:"
            " training resumes from it."
        )
    echo(f"To start again from nothing: {start_again(config)}")


def start_again(config: Config) -> str:
    """Return the command that removes everything and runs the demo again."""
    return f"rm -r {config.run_dir} {Path(config.data.path).parent} && make demo"


def train(config: Config, *overrides: str) -> None:
    """Train the demo's run. Raises UserError where training fails."""
    started = time.monotonic()
    code = start_training(str(CONFIG), list(overrides), ranks=RANKS)
    if code:
        raise UserError(
            f"training ended with exit code {code}; see the message above. When that is fixed, make"
            " demo continues"
        )
    if not overrides:
        echo(f"took {(time.monotonic() - started) / 60:.1f} minutes with start-up")


def prove_resume(config: Config) -> int:
    """Resume from the middle checkpoint in a copy of the run and compare every logged loss.

    Returns:
        The number of bit-identical losses.

    Raises:
        UserError: A loss differs.
    """
    run, copy = config.run_dir, config.run_dir.with_name(config.run_dir.name + "-resumed")
    middle = next(
        s for s in sorted(steps(run / "checkpoints")) if s >= (config.checkpoint.every_steps or 0)
    )
    stop = min(middle + RESUMED_STEPS, config.last_step)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(
        folder_of_step(run / "checkpoints", middle), folder_of_step(copy / "checkpoints", middle)
    )
    shutil.copy(run / "config.yaml", copy)
    train(config, f"run.dir={copy}", f"train.stop_at={stop}", "validation.every_steps=null")
    losses = [
        {
            e["step"]: e["loss"]
            for e in read_events(folder / "metrics.jsonl", "train")
            if middle < e["step"] <= stop
        }
        for folder in (run, copy)
    ]
    for step, loss in losses[1].items():
        same = losses[0].get(step) == loss
        echo(
            f"step {step}: uninterrupted {losses[0].get(step)!r}, resumed {loss!r}:"
            f" {'identical' if same else 'DIFFERENT'}"
        )
    if not losses[1] or any(losses[0].get(step) != loss for step, loss in losses[1].items()):
        raise UserError(
            "the resumed run is not the uninterrupted one; please report this with the lines above"
        )
    shutil.rmtree(copy)
    return len(losses[1])


def evaluate(config: Config) -> dict[str, Any]:
    """Evaluate beside compressors. Raises UserError when the model is worse than zlib."""
    protocol = EvaluationProtocol(
        stride=config.max_position // STRIDES_PER_WINDOW, compressors=True
    )
    with progress_bars("evaluating") as progress:
        result = evaluate_model(
            open_model(config.run_dir),
            validation_texts(Path(config.data.path)),
            protocol,
            progress=progress,
        )
    write_result(result, config.run_dir / "evaluation.json")
    console.print(evaluation_table(result))
    console.print(compressor_table(result))
    for compressor in ("zlib -9", "bz2 -9", "xz -9e"):
        behind = [
            d
            for d, f in result["domains"].items()
            if f["bpb"] >= f["compressors"][compressor]["bpb_concatenated"]
        ]
        echo(
            f"against {compressor} on one stream: "
            + (f"behind in {', '.join(behind)}" if behind else "ahead in every domain")
        )
        if behind and compressor == "zlib -9":
            raise UserError(
                f"the model is worse than zlib in {', '.join(behind)}; was training cut short?"
            )
    return result


def sample(config: Config) -> None:
    """Print one continuation of each prompt and save them for the report."""
    loaded = open_model(config.run_dir)
    model, tokenizer = loaded.decoder, loaded.tokenizer
    sampling = Sampling(0.7, top_p=0.95, seed=1)
    prompts = list(PROMPTS.values())
    tokens = [prompt_tokens(model, tokenizer, prompt) for prompt in prompts]
    continuations = list(
        generate(model, tokenizer, tokens, GenerationConfig(sampling, max_tokens=100))
    )
    for kind, prompt, continuation in zip(PROMPTS, prompts, continuations, strict=True):
        echo(f"\n--- {kind} prompt: {json.dumps(prompt)}")
        echo(prompt + continuation.text)
    save_samples(
        config.run_dir,
        [
            sample_record(loaded.step, loaded.weights, prompt, c, sampling)
            for prompt, c in zip(prompts, continuations, strict=True)
        ],
    )


def summary(config: Config, result: dict[str, Any], proved: int, page: Path) -> None:
    """Print the last table and commands to try next."""
    record = read_runs([config.run_dir])[0]
    table = Table(
        title="what was learned, in bits per byte of held-out text",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    domains = result["domains"]
    for name in domains:
        table.add_column(name, justify="right")
    untrained = [
        math.log2(config.model.vocab_size) * f["tokens"] / f["bytes"] for f in domains.values()
    ]
    table.add_row(
        "before training (every token equally likely)", *(f"{bits:.3f}" for bits in untrained)
    )
    table.add_row("the model now", *(f"{f['bpb']:.3f}" for f in domains.values()), style="bold")
    best = [
        min((c["bpb_concatenated"], name) for name, c in f["compressors"].items())
        for f in domains.values()
    ]
    table.add_row("the best compressor", *(f"{bits:.3f} ({name})" for bits, name in best))
    echo()
    console.print(table)
    echo(
        f"{record.parameters:,} parameters, {record.last['tokens']:,} tokens in"
        f" {readable_duration(record.seconds())} of steps, {record.median_rate():,.0f} tokens/s;"
        f" {proved} losses of the resumed run bit-identical"
    )
    echo("\nNext:")
    for text, command in (
        ("see all of it", f"open {page} in a browser"),
        ("let it write", f".venv/bin/nextpt generate --run {config.run_dir} --prompt 'import '"),
        (
            "try another shape",
            (
                ".venv/bin/nextpt train --config configs/demo.yaml run.name=wide model.width=256"
                " --ranks 2"
            ),
        ),
        ("compare the two", f".venv/bin/nextpt report {config.run_dir} runs/wide"),
        ("use your own text", ".venv/bin/nextpt prep shards --help"),
        ("start again", start_again(config)),
    ):
        echo(f"  {text:<18} {command}")
