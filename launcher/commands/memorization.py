"""`nextpt memorization`: what a run has by heart, and what of an evaluation set was in its training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.console import build_table, console, echo, progress_bars
from launcher.registration import add_command, add_group

RunFolder = Annotated[Path, typer.Option("--run", help="run folder, such as runs/demo")]
Step = Annotated[int | None, typer.Option(help="step of the checkpoint; the newest unless given")]
Json = Annotated[Path | None, typer.Option("--json", help="also write the figures to this file")]
Plot = Annotated[Path | None, typer.Option(help="also draw them: a .png, .svg or .pdf file")]


def plant(
    folder: Annotated[
        Path,
        typer.Argument(
            help="where canaries.jsonl (for `nextpt prep shards`) and canaries.json are written"
        ),
    ],
    each: Annotated[
        int, typer.Option(min=1, help="canaries for each number of repeats, 1, 2, 4, ... 128")
    ] = 8,
    controls: Annotated[int, typer.Option(min=1, help="canaries that are never shown")] = 256,
    seed: Annotated[int, typer.Option(help="of the random texts")] = 0,
) -> None:
    """Make random texts to add to a corpus, so that `canaries` can tell later how well they were remembered."""
    from nextpt.evaluate.memorization.canaries import make_canaries, write_canaries

    made = make_canaries(each, controls, seed)
    write_canaries(made, folder)
    echo(
        f"{folder}/canaries.jsonl: {sum(c.repeats for c in made):,} documents,"
        f" {len(made) - controls} texts; keep {folder}/canaries.json"
    )


def canaries(
    folder: Annotated[Path, typer.Argument(help="what `plant` wrote")],
    run: RunFolder,
    step: Step = None,
    json_path: Json = None,
    plot: Plot = None,
) -> None:
    """Extraction and exposure of planted texts against how often they were shown, beside texts that never were."""
    from nextpt.evaluate.heldout import open_model
    from nextpt.evaluate.memorization.canaries import read_canaries
    from nextpt.evaluate.memorization.measure import measure_canaries
    from nextpt.generate.text import pick_device

    planted = read_canaries(folder)
    config, model, tokenizer, at = open_model(run, step, pick_device())
    with progress_bars("trying") as progress:
        found = measure_canaries(config, model, tokenizer, planted, progress)
    result = {"run": str(run), "step": at, "by_repeats": found}
    rows = [
        [
            repeats if int(repeats) else "never",
            f"{f['nats']['of']}",
            interval(f["extracted"], "share", 100),
            interval(f["score"], "mean", 100),
            interval(f["exposure_bits"], "mean"),
        ]
        for repeats, f in found.items()
    ]
    console.print(
        build_table(
            f"canaries, step {at} (95 % intervals)",
            ["shown", "texts", "extracted, %", "tokens agree, %", "exposure, bits"],
            rows,
        )
    )
    _write(result, json_path)
    if plot:
        from nextpt.observe.memorization_plots import plot_canaries

        plot_canaries(result, plot)
        echo(f"drawn in {plot}")


def extract(
    run: RunFolder,
    step: Step = None,
    data: Annotated[
        Path | None, typer.Option(help="dataset folder; the run's own unless given")
    ] = None,
    prefixes: Annotated[str, typer.Option(help="lengths of the prefixes, tokens")] = "16,32,64,128",
    continuation: Annotated[int, typer.Option(min=1, help="tokens that the model must give")] = 32,
    count: Annotated[int, typer.Option(min=1, help="sequences of each side")] = 256,
    seed: Annotated[int, typer.Option(help="of the choice of sequences")] = 0,
    json_path: Json = None,
    plot: Plot = None,
) -> None:
    """Of stretches of training and held-out documents: how many does the model continue, token for token?"""
    from data_prep.format import SPLITS
    from nextpt.data.dataset import open_sequences
    from nextpt.evaluate.heldout import open_model
    from nextpt.evaluate.memorization.measure import measure_extraction
    from nextpt.generate.text import pick_device

    lengths = _lengths(prefixes)
    config, model, _, at = open_model(run, step, pick_device())
    folder = data or Path(config.data.path)
    with progress_bars("continuing") as progress:
        found = measure_extraction(
            config,
            model,
            {side: list(open_sequences(folder, side).values()) for side in SPLITS},
            prefixes=lengths,
            continuation=continuation,
            count=count,
            seed=seed,
            progress=progress,
        )
    result = {"run": str(run), "step": at, "continuation": continuation, "seed": seed} | found
    columns = (("exact", "share"), ("near", "share"), ("score", "mean"))
    rows = [
        [
            side,
            str(p),
            *(interval(found[side]["prefixes"][str(p)][name], key, 100) for name, key in columns),
        ]
        for side in SPLITS
        for p in lengths
    ]
    console.print(
        build_table(
            f"continuations of {continuation} tokens, greedy, step {at} (95 % intervals)",
            ["side", "prefix", "all agree, %", "9 of 10 agree, %", "tokens agree, %"],
            rows,
        )
    )
    for side in SPLITS:
        echo(
            f"{side}: {interval(found[side]['nats_per_token'], 'mean', digits=3)} nats per token of"
            f" the continuations, of {found[side]['sequences']} sequences"
        )
    echo(f"gap: {found['gap_nats_per_token']:.3f} nats per token")
    _write(result, json_path)
    if plot:
        from nextpt.observe.memorization_plots import plot_extraction

        plot_extraction(result, plot)
        echo(f"drawn in {plot}")


def contamination(
    run: Annotated[
        Path | None,
        typer.Option(
            help="run folder: its data, and bits per byte with and without what was found"
        ),
    ] = None,
    step: Step = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help=(
                "dataset folder whose training shards are looked through; the run's own unless"
                " given"
            )
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help=(
                "the evaluation set, in any form that `nextpt prep` reads; the held-out texts"
                " unless given"
            )
        ),
    ] = None,
    json_path: Json = None,
) -> None:
    """Which documents of an evaluation set share 13 words, or 50 characters, with the training shards?"""
    from nextpt.evaluate.memorization.examine import examine

    with progress_bars("reading") as progress:
        result = examine(run, step, data, text, progress)
    rows = [
        [
            domain,
            f"{f['documents']:,}",
            f"{f['contaminated']:,}",
            f"{f['with_13_words']:,}",
            f"{f['with_50_characters']:,}",
            " / ".join(
                _bits(f.get("bits_per_byte", {}).get(part))
                for part in ("all", "clean", "contaminated")
            ),
        ]
        for domain, f in result["domains"].items()
    ]
    console.print(
        build_table(
            "documents that share text with the training shards (bits per byte: all / clean /"
            " found)",
            ["domain", "documents", "found", "13 words", "50 chars", "bits per byte"],
            rows,
        )
    )
    if json_path is None and any(f["contaminated"] for f in result["domains"].values()):
        echo("which ones: --json FILE")
    _write(result, json_path)


def interval(value: dict[str, Any], key: str, scale: float = 1.0, digits: int | None = None) -> str:
    """ "x (low-high)" of a figure times `scale`, with its interval.

    The figure alone where it has none.
    """
    if value[key] is None:
        return "-"
    digits = digits if digits is not None else 1 if scale == 100 else 2
    middle, low, high = (
        None if value[k] is None else f"{scale * value[k]:.{digits}f}" for k in (key, "low", "high")
    )
    return middle if low is None else f"{middle} ({low}-{high})"


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _lengths(text: str) -> list[int]:
    from nextpt.base.errors import ConfigError

    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        lengths = []
    if not lengths or lengths[0] < 1:
        raise ConfigError(
            f"--prefixes {text}: expected numbers of tokens with commas between them, such as"
            " 16,32,64"
        )
    return lengths


def _write(result: dict[str, Any], path: Path | None) -> None:
    if path:
        from nextpt.evaluate.heldout import write_result

        write_result(result, path)
        echo(f"written to {path}")


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = add_group(
        app,
        "memorization",
        help="What a run has by heart, and what of an evaluation set it was trained on.",
    )
    add_command(
        group,
        "plant",
        plant,
        example="nextpt memorization plant data/canaries, then prep shards ... canaries=data/canaries/canaries.jsonl",
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
        example="nextpt memorization extract --run runs/demo --prefixes 16,64,128 --plot extraction.png",
    )
    add_command(
        group,
        "contamination",
        contamination,
        example="nextpt memorization contamination --run runs/demo    or: --data data/mine --text benchmark.jsonl",
    )
