"""`nextpt generate`: continue prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.console import echo
from launcher.registration import add_command

if TYPE_CHECKING:
    from nextpt.generate import Beams, Continuation, Ending, Sampling, Wanted

TEMPERATURE = 0.8  # unless given
LENGTH_PENALTY = 0.6  # unless given; see nextpt.generate.beam


def generate(
    run: Annotated[
        Path, typer.Option("--run", help="run folder, such as runs/demo, or a Hugging Face folder")
    ],
    prompt: Annotated[str | None, typer.Option(help="text to continue; empty unless given")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="many of them: .jsonl with a key `prompt`, or .txt with one on each line"
        ),
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="step of the checkpoint; the newest unless given")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="of each continuation")] = 200,
    samples: Annotated[
        int, typer.Option(min=1, help="continuations of each prompt; with --beams the best so many")
    ] = 1,
    temperature: Annotated[
        float | None, typer.Option(help="0: always the most probable token; 0.8 unless given")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="keep the k most probable tokens")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="keep the smallest set of this probability")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="keep tokens of at least this share of the largest probability"),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="above 1: tokens that were there already become less likely"),
    ] = None,
    beams: Annotated[
        int | None, typer.Option(help="beam search with so many hypotheses, instead of sampling")
    ] = None,
    length_penalty: Annotated[
        float | None, typer.Option(help="of beams, 0: none; 0.6 unless given")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="text that ends a continuation and is not shown; may be repeated"),
    ] = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same text")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="continuations decoded together")] = 32,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", help="also write tokens and their log-probabilities to this file"),
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="also keep the text in RUN/samples.json, for the report")
    ] = False,
) -> None:
    """Continue a prompt, or many.

    Ends at the end of the document, at a stop string, or where the model's positions end.
    """
    from nextpt.base.errors import UserError
    from nextpt.evaluate.heldout import write_result
    from nextpt.evaluate.source import open_source
    from nextpt.generate import Wanted, pick_device, prompt_tokens
    from nextpt.generate.prompts import read_prompts
    from nextpt.generate.records import generation_json, sample_record, save_samples

    if prompt is not None and prompts is not None:
        raise UserError("--prompt and --prompts: give one of them")
    given = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    searching = _beams(
        beams,
        length_penalty,
        [k for k, v in (given | {"save": save or None}).items() if v is not None],
    )
    sampling = _sampling(given, seed)
    wanted = Wanted(sampling, max_tokens, tuple(stop or ()), samples, batch_size)
    texts = read_prompts(prompts) if prompts else {"the prompt": prompt or ""}
    source = open_source(run, step, pick_device(), decoder_only=True)
    config, model, tokenizer, at = source.config, source.model, source.tokenizer, source.step
    if save and not source.is_run:
        raise UserError(
            f"--save keeps samples for the report of a run, and {run} is a Hugging Face folder;"
            " take --json"
        )
    encoded = [prompt_tokens(config, tokenizer, text, name) for name, text in texts.items()]
    found = _show((config, model, tokenizer), texts, encoded, wanted, searching)
    if json_path:
        settings = {
            "max_tokens": max_tokens,
            "stop": list(wanted.stop),
            "samples": samples,
        } | _settings(wanted, searching)
        write_result(
            generation_json(run, at, settings, list(texts.values()), tokenizer, found), json_path
        )
        echo(f"written to {json_path}")
    if save:
        save_samples(
            run, [sample_record(at, list(texts.values())[c.prompt], c, sampling) for c in found]
        )


def _sampling(given: dict[str, Any], seed: int) -> Sampling:
    from nextpt.generate import Sampling

    return Sampling(
        **{"temperature": TEMPERATURE} | {k: v for k, v in given.items() if v is not None},
        seed=seed,
    )


def _beams(width: int | None, length_penalty: float | None, against: list[str]) -> Beams | None:
    """The search that is asked for.

    Raises UserError for options that go with sampling only, or with beams only.
    """
    from nextpt.base.errors import UserError
    from nextpt.generate import Beams

    if width is None:
        if length_penalty is not None:
            raise UserError("--length-penalty is of beam search; give --beams too")
        return None
    if against:
        option = "--" + against[0].replace("_", "-")
        raise UserError(
            f"{option} goes with sampling, --beams draws nothing; leave one of them out"
        )
    return Beams(width, LENGTH_PENALTY if length_penalty is None else length_penalty)


def _settings(wanted: Wanted, beams: Beams | None) -> dict[str, Any]:
    from dataclasses import asdict

    return (
        {"beams": beams.width, "length_penalty": beams.length_penalty}
        if beams
        else asdict(wanted.sampling)
    )


def _show(
    opened: tuple[Any, Any, Any],
    texts: dict[str, str],
    encoded: list[list[int]],
    wanted: Wanted,
    beams: Beams | None,
) -> list[Continuation]:
    """Generate and print: one continuation as it grows, several each when it is done."""
    from nextpt.generate import Ending, beam_search
    from nextpt.generate import generate as continue_prompts

    alone = len(texts) == wanted.samples == 1
    streamed = alone and beams is None

    def hear(prompt: int, sample: int, piece: str) -> None:
        if streamed:
            _write(piece)

    if streamed:
        _write(next(iter(texts.values())))
    results = (
        (
            c
            for number, prompt in enumerate(encoded)
            for c in beam_search(*opened, prompt, wanted, beams, number)
        )
        if beams
        else continue_prompts(*opened, encoded, wanted, hear)
    )
    found = []
    for c in results:
        found.append(c)
        name, text = list(texts.items())[c.prompt]
        if not alone:
            echo(
                f"--- {name}, sample {c.sample + 1}: {_ended(c.ending)}; {len(c.tokens)} tokens,"
                f" {-sum(c.logprobs) / len(c.tokens):.3f} nats each"
            )
        _write("\n" if streamed else text + c.text + "\n")
        if alone and c.ending is Ending.CONTEXT:
            print(
                f"note: {_ended(c.ending)} ({opened[0].max_position} tokens, the prompt's"
                " included)",
                file=sys.stderr,
            )
    return found


def _ended(ending: Ending | None) -> str:
    from nextpt.generate import Ending

    return {
        Ending.DOCUMENT: "the document ended",
        Ending.STOP: "a stop string came",
        Ending.LENGTH: "as long as asked for",
        Ending.CONTEXT: "the model's positions end here",
    }[ending]


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    add_command(
        app,
        "generate",
        generate,
        example="nextpt generate --run runs/demo --prompt 'def main(' --temperature 0.8 --top-p 0.95",
    )
