"""`nextpt memorization`: canaries, extraction of training data, contamination of test sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.console import build_table, console, echo, format_interval, progress_bars
from launcher.options import JsonFile, PlotFile, RunFolder, Step, TextField, Weights, parse_sizes
from launcher.registration import add_command, add_group

PERCENT = 100.0
EXTRACTION_COLUMNS = (("exact", "share"), ("near", "share"), ("score", "mean"))


def plant(
    folder: Annotated[
        Path,
        typer.Argument(
            help="folder to write: canaries.jsonl (for `nextpt prep shards`) and canaries.json"
        ),
    ],
    per_repeats: Annotated[
        int,
        typer.Option("--each", min=1, help="canaries for each number of repeats, 1, 2, 4, ... 128"),
    ] = 8,
    controls: Annotated[int, typer.Option(min=1, help="canaries that are not shown")] = 256,
    seed: Annotated[int, typer.Option(help="seed of the random texts")] = 0,
) -> None:
    """Write random texts (canaries) to add to a corpus, for `nextpt memorization canaries`."""
    from nextpt.evaluate.memorization.canaries import make_canaries, write_canaries

    planted = make_canaries(per_repeats, controls, seed)
    write_canaries(planted, folder)
    echo(
        f"{folder}/canaries.jsonl: {sum(c.repeats for c in planted):,} documents,"
        f" {len(planted) - controls} texts; keep {folder}/canaries.json"
    )


def canaries(
    folder: Annotated[Path, typer.Argument(help="folder that `plant` wrote")],
    run: RunFolder,
    step: Step = None,
    weights: Weights = "weight",
    json_path: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Measure extraction and exposure of canaries by the number of times they were shown."""
    from nextpt.evaluate.loaded_model import open_model
    from nextpt.evaluate.memorization.canaries import read_canaries
    from nextpt.evaluate.memorization.measure import measure_canaries
    from nextpt.generate.text import pick_device
    from nextpt.observe.memorization_plots import plot_canaries

    planted = read_canaries(folder)
    loaded = open_model(run, step, pick_device(), decoder_only=True, weights=weights)
    with progress_bars("measuring") as progress:
        by_repeats = measure_canaries(loaded.decoder, loaded.tokenizer, planted, progress)
    result = {**loaded.to_json(), "by_repeats": by_repeats}
    rows = [
        [
            repeats if int(repeats) else "never",
            f"{metrics['nats']['of']}",
            format_metric(metrics["extracted"], "share", PERCENT),
            format_metric(metrics["score"], "mean", PERCENT),
            format_metric(metrics["exposure_bits"], "mean"),
        ]
        for repeats, metrics in by_repeats.items()
    ]
    headings = ["shown", "texts", "extracted, %", "tokens agree, %", "exposure, bits"]
    title = f"canaries, step {loaded.step} (95 % intervals)"
    console.print(build_table(title, headings, rows))
    _write(result, json_path, plot, plot_canaries)


def extract(
    run: RunFolder,
    step: Step = None,
    weights: Weights = "weight",
    data: Annotated[Path | None, typer.Option(help="dataset folder [default: the run's]")] = None,
    prefixes: Annotated[
        str, typer.Option(help="lengths of the prefixes, tokens, separated by commas")
    ] = "16,32,64,128",
    continuation: Annotated[int, typer.Option(min=1, help="tokens of a continuation")] = 32,
    count: Annotated[int, typer.Option(min=1, help="sequences per split")] = 256,
    seed: Annotated[int, typer.Option(help="seed of the choice of sequences")] = 0,
    json_path: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Measure how often a model continues training and held-out documents token for token."""
    from data_prep.format import SPLITS
    from nextpt.data.dataset import open_sequences
    from nextpt.evaluate.loaded_model import open_model
    from nextpt.evaluate.memorization.measure import measure_extraction
    from nextpt.evaluate.texts import encode_document, validation_texts
    from nextpt.generate.text import pick_device
    from nextpt.observe.memorization_plots import plot_extraction

    lengths = parse_sizes("--prefixes", prefixes)
    loaded = open_model(run, step, pick_device(), decoder_only=True, weights=weights)
    folder = data or loaded.dataset
    with progress_bars("continuing") as progress:
        metrics = measure_extraction(
            loaded.decoder,
            {split: open_sequences(folder, split) for split in SPLITS},
            prefixes=lengths,
            continuation=continuation,
            count=count,
            seed=seed,
            documents={
                domain: [encode_document(loaded.tokenizer, text)[0] for text in texts]
                for domain, texts in validation_texts(folder).items()
            },
            progress=progress,
        )
    result = {**loaded.to_json(), "continuation": continuation, "seed": seed, **metrics}
    _print_extraction(result, lengths, SPLITS)
    _write(result, json_path, plot, plot_extraction)


def _print_extraction(result: dict[str, Any], lengths: list[int], splits: tuple[str, ...]) -> None:
    rows = []
    for split in splits:
        for length in lengths:
            metrics = result[split]["prefixes"][str(length)]
            cells = [format_metric(metrics[name], key, PERCENT) for name, key in EXTRACTION_COLUMNS]
            rows.append([split, str(length), *cells])
    title = (
        f"continuations of {result['continuation']} tokens, greedy, step {result['step']}"
        " (95 % intervals)"
    )
    headings = ["split", "prefix", "all agree, %", "9 of 10 agree, %", "tokens agree, %"]
    console.print(build_table(title, headings, rows))
    for split in splits:
        nats = format_metric(result[split]["nats_per_token"], "mean", digits=3)
        echo(
            f"{split}: {nats} nats per token of the continuations, of"
            f" {result[split]['sequences']} sequences"
        )
    if result["gap_nats_per_token"] is None:
        echo("gap: none, no domain has sequences of both splits")
        return
    interval = format_interval(result["gap_interval"]) or "no interval: one document each"
    domains = ", ".join(
        f"{name} {of['gap']:+.3f} (share {of['share']:.0%})"
        for name, of in result["gap_by_domain"].items()
    )
    echo(f"gap: {result['gap_nats_per_token']:+.3f} nats per token (95 % {interval}): {domains}")


def contamination(
    run: Annotated[
        Path | None,
        typer.Option(
            help="run folder: its dataset, and bits per byte with and without contamination"
        ),
    ] = None,
    step: Step = None,
    weights: Weights = "weight",
    data: Annotated[
        Path | None,
        typer.Option(help="dataset folder whose training shards are searched [default: the run's]"),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help=(
                "evaluation set, in any form that `nextpt prep` reads [default: the held-out"
                " documents]"
            )
        ),
    ] = None,
    text_field: TextField = "text",
    json_path: JsonFile = None,
) -> None:
    """Find documents of a test set that share 13 words or 50 characters with the training data."""
    from nextpt.evaluate.memorization.examine import examine

    with progress_bars("reading") as progress:
        result = examine(run, step, data, text, progress, weights, text_field)
    rows = []
    for domain, metrics in result["domains"].items():
        bits = metrics.get("bits_per_byte", {})
        rows.append(
            [
                domain,
                f"{metrics['documents']:,}",
                f"{metrics['contaminated']:,}",
                f"{metrics['with_13_words']:,}",
                f"{metrics['with_50_characters']:,}",
                " / ".join(_format_bits(bits.get(k)) for k in ("all", "clean", "contaminated")),
            ]
        )
    title = (
        "documents that share text with the training shards (bits per byte: all / clean /"
        " contaminated)"
    )
    headings = ["domain", "documents", "contaminated", "13 words", "50 chars", "bits per byte"]
    console.print(build_table(title, headings, rows))
    is_contaminated = any(metrics["contaminated"] for metrics in result["domains"].values())
    if json_path is None and is_contaminated:
        echo("--json FILE lists them")
    _write(result, json_path)


def format_metric(
    metric: dict[str, Any], key: str, scale: float = 1.0, digits: int | None = None
) -> str:
    """Format a metric with its interval as "x (low-high)".

    Args:
        metric: Value under `key`, and the interval's ends under "low" and "high" (None where there
            is none).
        key: Key of the value.
        scale: Factor of all three.
        digits: Decimal places; 1 for percentages and 2 for others unless given.
    """
    if metric[key] is None:
        return "-"
    decimals = digits if digits is not None else 1 if scale == PERCENT else 2
    value = f"{scale * metric[key]:.{decimals}f}"
    if metric["low"] is None:
        return value
    return f"{value} ({scale * metric['low']:.{decimals}f}-{scale * metric['high']:.{decimals}f})"


def _format_bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _write(
    result: dict[str, Any],
    json_path: Path | None,
    plot: Path | None = None,
    draw: Callable[[dict[str, Any], Path], None] | None = None,
) -> None:
    from nextpt.evaluate.texts import write_result

    if json_path:
        write_result(result, json_path)
        echo(f"written to {json_path}")
    if plot and draw:
        draw(result, plot)
        echo(f"plotted in {plot}")


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = add_group(
        app,
        "memorization",
        help="Memorization of training data, and contamination of evaluation sets.",
    )
    add_command(
        group,
        "plant",
        plant,
        example=(
            "nextpt memorization plant data/canaries, then prep shards ..."
            " canaries=data/canaries/canaries.jsonl"
        ),
    )
    add_command(
        group,
        "canaries",
        canaries,
        example="nextpt memorization canaries data/canaries --run runs/mine",
    )
    add_command(
        group,
        "extract",
        extract,
        example=(
            "nextpt memorization extract --run runs/demo --prefixes 16,64,128 --plot extraction.png"
        ),
    )
    add_command(
        group,
        "contamination",
        contamination,
        example=(
            "nextpt memorization contamination --run runs/demo    or: --data data/mine"
            " --text benchmark.jsonl"
        ),
    )
