"""`nextpt export` and `nextpt import`: models to and from other people's layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.console import echo
from launcher.registration import add_command, add_group

Run = Annotated[Path, typer.Option("--run", help="run folder, such as runs/demo")]
Step = Annotated[int | None, typer.Option(help="step of the checkpoint; the newest unless given")]
Output = Annotated[Path, typer.Option(help="folder to write; it must not exist")]


def hf_export(
    run: Run,
    output: Output,
    step: Step = None,
    dtype: Annotated[str, typer.Option(help="of the weights: fp32 or bf16")] = "fp32",
) -> None:
    """Safetensors, config and tokenizer that the transformers library loads, with the same logits."""
    from nextpt.evaluate.heldout import open_run
    from nextpt.exchange import export_hf

    checkpoint = open_run(run, step)
    architecture = export_hf(checkpoint, run / "tokenizer.json", output, dtype=dtype)
    echo(f"step {checkpoint.step} written to {output} as {architecture}, {dtype}, {_size(output)}")


def deepspeed_export(run: Run, output: Output, step: Step = None) -> None:
    """The fp32 weights in DeepSpeed's layout, with its zero_to_fp32.py."""
    from nextpt.evaluate.heldout import open_run
    from nextpt.exchange import export_deepspeed

    checkpoint = open_run(run, step)
    export_deepspeed(checkpoint, output)
    echo(
        f"step {checkpoint.step} written to {output}, {_size(output)}; next: python"
        f" {output}/zero_to_fp32.py {output} WEIGHTS"
    )


def hf_import(
    folder: Annotated[Path, typer.Argument(help="local folder with config.json and *.safetensors")],
    data: Annotated[
        Path,
        typer.Option(
            help="dataset folder, made with `nextpt prep shards --tokenizer FOLDER/tokenizer.json`"
        ),
    ],
    output: Annotated[Path, typer.Option(help="YAML file to write; it must not exist")],
) -> None:
    """Check a Hugging Face model and write the config of a run that starts from its weights."""
    from data_prep.format import DatasetManifest
    from nextpt.base.errors import ConfigError
    from nextpt.base.files import atomic_write
    from nextpt.config import to_yaml
    from nextpt.data.dataset import check_dataset
    from nextpt.exchange import HFWeights, config_from_hf
    from nextpt.model import ModelSpec, count
    from nextpt.train.start import check_tokenizer

    if output.exists():
        raise ConfigError(f"{output} exists already; remove it or name another --output")
    weights, manifest = HFWeights(folder), DatasetManifest.load(data)
    config = config_from_hf(
        weights, name=output.stem, data=data, sequence_length=manifest.sequence_length
    )
    check_dataset(config, manifest)
    check_tokenizer(config)
    try:
        with atomic_write(output) as file:
            file.write(to_yaml(config))
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}") from None
    echo(
        f"{weights.architecture.name}, {count(ModelSpec.from_config(config)).parameters:,} parameters; look at optimizer,"
        f" schedule and train in {output}, then: nextpt train --config {output}"
    )


def _size(folder: Path) -> str:
    return f"{sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()) / 1e6:,.1f} MB"


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    export_group = add_group(
        app, "export", help="Write a checkpoint in another layout, see docs/export.md."
    )
    add_command(
        export_group, "hf", hf_export, example="nextpt export hf --run runs/demo --output exported"
    )
    add_command(
        export_group,
        "deepspeed",
        deepspeed_export,
        example="nextpt export deepspeed --run runs/demo --output exported && python exported/zero_to_fp32.py exported weights",
    )
    import_group = add_group(
        app, "import", help="Start from a model that others trained, see docs/export.md."
    )
    add_command(
        import_group,
        "hf",
        hf_import,
        example="nextpt import hf Qwen3-0.6B --data data/mine --output continued.yaml",
    )
