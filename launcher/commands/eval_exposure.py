"""`nextpt eval --exposure-bias`: what the command shows of a model that runs free."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from launcher.commands.eval_common import deliver, open_with_texts
from launcher.console import out, say, shares_progress, small_table


def run_exposure(
    path: Path,
    step: int | None,
    data: Path | None,
    text: list[Path] | None,
    wanted: Any,
    json_path: Path | None,
    plot: Path | None,
) -> None:
    """Measure, print, write, draw. wanted: an Exposure. Raises UserError."""
    from nextpt.evaluate.exposure import exposure_bias
    from nextpt.observe.exposure_picture import draw_exposure

    source, texts = open_with_texts(path, step, data, text, decoder_only=True)
    with shares_progress("running free on") as progress:
        result = exposure_bias(source, texts, wanted, progress)
    _show(result)
    deliver(result, [json_path], plot, partial(draw_exposure, result))


def _cell(figure: dict[str, Any], signed: bool = False) -> str:
    low_high = figure["interval"]
    return f"{figure['value']:{'+' if signed else ''}.3f}" + (
        f" ±{(low_high[1] - low_high[0]) / 2:.3f}" if low_high else ""
    )


def _show(result: dict[str, Any]) -> None:
    p, rows = result["protocol"], []
    domains = (
        result["domains"]
        if len(result["domains"]) == 1
        else result["domains"] | {"total": result["total"]}
    )
    for domain, of in domains.items():
        rows += [
            [
                f"{domain}, {name}",
                *(_cell(figures[key]) for key in ("nats_per_token", "entropy")),
                f"{figures['repeats']['value']:.1%}",
            ]
            for name, figures in of["arms"].items()
        ]
    at = "" if result["step"] is None else f", step {result['step']}"
    title = (
        f"{p['continuation']} tokens after {p['prefix']} of held-out text{at}: the real ones, and"
        " the model's own"
    )
    out.print(small_table(title, ["", "nats/token", "entropy", "repeated 4-grams"], rows))
    out.print(
        small_table(
            "gap, real - sampled = miscalibration + drift, nats/token",
            ["", "stretches", "gap", "miscalibration", "drift"],
            [
                [
                    domain,
                    f"{of['stretches']:,}",
                    *(_cell(of[key], signed=True) for key in ("gap", "miscalibration", "drift")),
                ]
                for domain, of in domains.items()
            ],
        )
    )
    out.print(
        small_table(
            "nats/token by place in the continuation",
            ["places", "real", "sampled", "greedy", "gap", "drift"],
            [
                [
                    (
                        f"{row['from']}"
                        if row["from"] == row["to"]
                        else f"{row['from']} to {row['to']}"
                    ),
                    *(f"{row[name]['value']:.3f}" for name in ("real", "sampled", "greedy")),
                    *(_cell(row[name], signed=True) for name in ("gap", "drift")),
                ]
                for row in result["by_position"]
            ],
        )
    )
    say(
        "miscalibration: loss on real text beyond the entropy of what was predicted there. drift:"
        " that entropy less the loss on the model's own\ntext, 0 if its own text were to it as real"
        " text is. Special tokens are left out, so figures differ a little from those of nextpt"
        " eval."
    )
    say(
        f"±: half of {p['intervals']['confidence']:.0%} intervals, bootstrap of documents,"
        f" {p['intervals']['resamples']} resamples, seed {p['seed']}; none where there is one"
        " document"
    )
