"""Inputs and outputs shared by the variants of `nextpt eval`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.console import echo
from nextpt.base.errors import UserError

if TYPE_CHECKING:
    from nextpt.evaluate.loaded_model import LoadedModel

Json = dict[str, Any]


@dataclass(frozen=True)
class EvaluationInputs:
    """The model and the documents that a command line names.

    Attributes:
        run: Run folder; exactly one of run and model is set.
        model: Hugging Face folder.
        step: Step of the checkpoint; None is the newest.
        all_steps: Evaluate every checkpoint of the run.
        data: Dataset folder whose held-out documents are scored; None with text None is the run's.
        text: Files to score, those without records as one document each.
        text_field: Key of the text in their records.
        weights: "weight", or an average of the weights of the run.
    """

    run: Path | None
    model: Path | None
    step: int | None
    all_steps: bool
    data: Path | None
    text: list[Path] | None
    weights: str = "weight"
    text_field: str = "text"

    def __post_init__(self) -> None:
        if (self.run is None) == (self.model is None):
            raise UserError("give either --run, a run folder, or --model, a Hugging Face folder")
        if self.data and self.text:
            raise UserError("give either --data or --text; each names the documents to score")
        if self.model and not (self.data or self.text):
            raise UserError(
                "--model has no held-out documents of its own; name the documents to score with"
                " --text FILE or --data FOLDER"
            )
        if self.model and (self.all_steps or self.step is not None):
            raise UserError(
                "--step and --all-steps need a --run; a Hugging Face folder is one model"
            )
        if self.all_steps and self.step is not None:
            raise UserError("give either --step or --all-steps")

    @property
    def path(self) -> Path:
        """The run folder or the Hugging Face folder."""
        path = self.run or self.model
        assert path is not None  # __post_init__
        return path

    def steps(self) -> list[int | None]:
        """Steps to evaluate, lowest first; [None] is the newest checkpoint."""
        if not self.all_steps:
            return [self.step]
        from nextpt.checkpoint.folders import list_checkpoints, step_of
        from nextpt.evaluate.loaded_model import open_run

        open_run(self.path)  # raises where the run has no valid checkpoint
        valid, *_ = list_checkpoints(self.path / "checkpoints")
        steps: list[int | None] = []
        steps += sorted({step_of(checkpoint.folder) for checkpoint in valid})
        return steps

    def open(
        self, step: int | None, *, decoder_only: bool = False
    ) -> tuple[LoadedModel, dict[str, list[str]]]:
        """Open the model at a step and read the documents.

        Args:
            step: Step of the checkpoint; None is the newest.
            decoder_only: Refuse Hugging Face models that run through transformers.

        Returns:
            The model, and the documents of each domain.

        Raises:
            CheckpointError: The run has no such checkpoint.
            DataError: The documents cannot be read.
        """
        from nextpt.evaluate.loaded_model import open_model
        from nextpt.evaluate.texts import text_files, validation_texts
        from nextpt.generate import pick_device

        texts = None  # read before the model, so that an error costs no time
        if self.text:
            texts = text_files(self.text, self.text_field)
        elif self.data:
            texts = validation_texts(self.data)
        source = open_model(
            self.path, step, pick_device(), decoder_only=decoder_only, weights=self.weights
        )
        return source, texts or validation_texts(source.dataset)


@dataclass(frozen=True)
class ResultFiles:
    """Files that a result is written to.

    Attributes:
        json_paths: JSON files; None entries are skipped.
        plot: Plot (.png, .svg or .pdf), or None.
    """

    json_paths: list[Path | None]
    plot: Path | None

    def write(self, result: Json, draw: Callable[[Path], None]) -> None:
        """Write the JSON files, and the plot with `draw`. Raises DataError."""
        from nextpt.evaluate.texts import write_result

        for path in filter(None, self.json_paths):
            write_result(result, path)
            echo(f"written to {path}")
        if self.plot:
            draw(self.plot)
            echo(f"plotted in {self.plot}")


def refuse_options(mode: str, options: Mapping[str, object]) -> None:
    """Raise UserError for options that do not apply to a mode of `nextpt eval`.

    Args:
        mode: Name of the mode, for the message.
        options: Whether each option was given.
    """
    if names := [name for name, present in options.items() if present]:
        raise UserError(
            f"{', '.join(names)} cannot be given with {mode}, which does not report the loss on"
            " whole documents"
        )
