"""`nextpt generate`: continue prompts by sampling or beam search."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.console import echo
from launcher.options import JsonFile, RunOrModelFolder, Step, Weights
from launcher.registration import add_command
from nextpt.base.errors import UserError

if TYPE_CHECKING:
    from nextpt.evaluate.loaded_model import LoadedModel
    from nextpt.generate import (
        BeamSearchConfig,
        Continuation,
        FinishReason,
        GenerationConfig,
        Sampling,
    )

DEFAULT_TEMPERATURE = 0.8
DEFAULT_LENGTH_PENALTY = 0.6  # see nextpt.generate.beam

Prompt = Annotated[str | None, typer.Option(help="text to continue [default: empty]")]
PromptsFile = Annotated[
    Path | None,
    typer.Option(help="several prompts: .jsonl with a key `prompt`, or .txt with one per line"),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="maximum tokens of a continuation")]
Samples = Annotated[
    int, typer.Option(min=1, help="continuations per prompt; with --beams the best hypotheses")
]
Temperature = Annotated[
    float | None,
    typer.Option(help=f"0 is greedy decoding [default: {DEFAULT_TEMPERATURE}]"),
]
TopK = Annotated[int | None, typer.Option(help="keep the k most probable tokens")]
TopP = Annotated[
    float | None, typer.Option(help="keep the smallest set of tokens with this probability")
]
MinP = Annotated[
    float | None,
    typer.Option(help="keep tokens with at least this fraction of the largest probability"),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="above 1 makes tokens that occurred before less likely")
]
BeamWidth = Annotated[
    int | None, typer.Option("--beams", help="beam search of this width, instead of sampling")
]
LengthPenalty = Annotated[
    float | None,
    typer.Option(
        help=f"length penalty of the beam search, 0 is none [default: {DEFAULT_LENGTH_PENALTY}]"
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="text that ends a continuation and is not printed; may be repeated"),
]
SampleSeed = Annotated[int, typer.Option(help="seed; the same seed gives the same text")]
BatchSize = Annotated[int, typer.Option(min=1, help="continuations that are decoded together")]
SaveSamples = Annotated[
    bool, typer.Option("--save", help="also write the text to RUN/samples.json, for the report")
]


def generate(
    run: RunOrModelFolder,
    prompt: Prompt = None,
    prompts: PromptsFile = None,
    step: Step = None,
    weights: Weights = "weight",
    max_tokens: MaxTokens = 200,
    samples: Samples = 1,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    beams: BeamWidth = None,
    length_penalty: LengthPenalty = None,
    stop: Stop = None,
    seed: SampleSeed = 0,
    batch_size: BatchSize = 32,
    json_path: JsonFile = None,
    save: SaveSamples = False,
) -> None:
    """Continue one prompt or several.

    A continuation ends at the end of the document, at a stop string, at --max-tokens, or at the
    model's last position.
    """
    from nextpt.evaluate.loaded_model import open_model
    from nextpt.generate import GenerationConfig, pick_device, prompt_tokens
    from nextpt.generate.prompts import read_prompts

    if prompt is not None and prompts is not None:
        raise UserError("--prompt and --prompts: give one of them")
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    sampling_options = {name: value for name, value in options.items() if value is not None}
    refused = [*sampling_options, *(["save"] if save else [])]
    beam_search = _beam_search(beams, length_penalty, refused)
    sampling = _sampling(sampling_options, seed)
    request = GenerationConfig(sampling, max_tokens, tuple(stop or ()), samples, batch_size)
    texts = read_prompts(prompts) if prompts else {"the prompt": prompt or ""}
    source = open_model(run, step, pick_device(), decoder_only=True, weights=weights)
    if save and not source.is_run:
        raise UserError(
            f"--save writes samples for the report of a run, and {run} is a Hugging Face folder;"
            " use --json"
        )
    tokens = [
        prompt_tokens(source.decoder, source.tokenizer, text, name) for name, text in texts.items()
    ]
    generation = Generation(run, source, texts, tokens, request, beam_search)
    generation.run_and_print()
    if json_path:
        generation.write_json(json_path)
    if save:
        generation.save_samples()


@dataclass
class Generation:
    """One call of `nextpt generate`.

    Attributes:
        folder: The run folder or Hugging Face folder.
        source: The opened model.
        texts: Name of each prompt (file and line) and its text.
        tokens: Tokens of each prompt.
        request: What to generate.
        beams: Beam search, or None for sampling.
    """

    folder: Path
    source: LoadedModel
    texts: dict[str, str]
    tokens: list[list[int]]
    request: GenerationConfig
    beams: BeamSearchConfig | None

    def __post_init__(self) -> None:
        self.continuations: list[Continuation] = []
        self.is_single = len(self.texts) == self.request.samples == 1

    def run_and_print(self) -> None:
        """Print a single sampled continuation as it is decoded, others when they are complete."""
        from nextpt.generate import FinishReason

        streams = self.is_single and self.beams is None
        if streams:
            _write(next(iter(self.texts.values())))
        for continuation in self._continuations(streams):
            self.continuations.append(continuation)
            name, text = list(self.texts.items())[continuation.prompt]
            if not self.is_single:
                nats = -sum(continuation.logprobs) / len(continuation.tokens)
                echo(
                    f"--- {name}, sample {continuation.sample + 1}:"
                    f" {_describe(continuation.finish_reason)}; {len(continuation.tokens)} tokens,"
                    f" {nats:.3f} nats each"
                )
            _write("\n" if streams else text + continuation.text + "\n")
            if self.is_single and continuation.finish_reason is FinishReason.CONTEXT:
                print(
                    f"note: {_describe(continuation.finish_reason)}"
                    f" ({self.source.model.max_position} tokens, including the prompt)",
                    file=sys.stderr,
                )

    def _continuations(self, streams: bool) -> Iterable[Continuation]:
        from nextpt.generate import beam_search, generate

        model = (self.source.decoder, self.source.tokenizer)
        if self.beams:
            for number, prompt in enumerate(self.tokens):
                yield from beam_search(*model, prompt, self.request, self.beams, number)
            return

        def on_text(prompt: int, sample: int, piece: str) -> None:
            if streams:
                _write(piece)

        yield from generate(*model, self.tokens, self.request, on_text)

    def write_json(self, path: Path) -> None:
        """Write tokens and log-probabilities. Raises DataError."""
        from nextpt.evaluate.texts import write_result
        from nextpt.generate.records import generation_json

        settings: dict[str, Any] = {
            "max_tokens": self.request.max_tokens,
            "stop": list(self.request.stop),
            "samples": self.request.samples,
        }
        if self.beams:
            settings |= {"beams": self.beams.width, "length_penalty": self.beams.length_penalty}
        else:
            settings |= asdict(self.request.sampling)
        result = generation_json(
            self.source.to_json(),
            settings,
            list(self.texts.values()),
            self.source.tokenizer,
            self.continuations,
        )
        write_result(result, path)
        echo(f"written to {path}")

    def save_samples(self) -> None:
        """Add the texts to RUN/samples.json. Raises DataError."""
        from nextpt.generate.records import sample_record, save_samples

        assert self.source.step is not None  # a run, checked before
        prompts = list(self.texts.values())
        records = [
            sample_record(
                self.source.step,
                self.source.weights,
                prompts[c.prompt],
                c,
                self.request.sampling,
            )
            for c in self.continuations
        ]
        save_samples(self.folder, records)


def _sampling(options: dict[str, Any], seed: int) -> Sampling:
    from nextpt.generate import Sampling

    return Sampling(**{"temperature": DEFAULT_TEMPERATURE} | options, seed=seed)


def _beam_search(
    width: int | None, length_penalty: float | None, sampling_options: list[str]
) -> BeamSearchConfig | None:
    """Build the beam search, or None without --beams.

    Args:
        width: Value of --beams.
        length_penalty: Value of --length-penalty.
        sampling_options: Names of the options that were given and apply to sampling only.

    Raises:
        UserError: An option of sampling is given with --beams, or --length-penalty without it.
    """
    from nextpt.generate import BeamSearchConfig

    if width is None:
        if length_penalty is not None:
            raise UserError("--length-penalty is an option of the beam search; give --beams too")
        return None
    if sampling_options:
        option = "--" + sampling_options[0].replace("_", "-")
        raise UserError(
            f"{option} is an option of sampling and --beams does not sample; leave one of them out"
        )
    return BeamSearchConfig(
        width, DEFAULT_LENGTH_PENALTY if length_penalty is None else length_penalty
    )


def _describe(ending: FinishReason | None) -> str:
    from nextpt.generate import FinishReason

    assert ending is not None  # the continuation is complete
    return {
        FinishReason.DOCUMENT: "end of the document",
        FinishReason.STOP: "stop string",
        FinishReason.LENGTH: "maximum number of tokens",
        FinishReason.CONTEXT: "the model's last position is reached",
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
        example=(
            "nextpt generate --run runs/demo --prompt 'def main(' --temperature 0.8 --top-p 0.95"
        ),
    )
