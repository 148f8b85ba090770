"""`nextpt export` and `nextpt import`: models to and from Hugging Face and DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.console import echo
from launcher.options import RunFolder, Step, Weights
from launcher.registration import add_command, add_group
from nextpt.base.errors import ConfigError

Output = Annotated[Path, typer.Option(help="folder to write; it must not exist")]


def hf_export(
    run: RunFolder,
    output: Output,
    step: Step = None,
    weights: Weights = "weight",
    dtype: Annotated[str, typer.Option(help="dtype of the weights: fp32 or bf16")] = "fp32",
) -> None:
    """Write safetensors, config and tokenizer that transformers loads with the same logits."""
    from nextpt.evaluate.loaded_model import open_run
    from nextpt.exchange import export_hf

    checkpoint = open_run(run, step, weights=weights)
    architecture = export_hf(checkpoint, run / "tokenizer.json", output, dtype=dtype)
    size = _format_size(output)
    echo(f"step {checkpoint.step} written to {output} as {architecture}, {dtype}, {size}")
    if depth := checkpoint.state["config"]["model"].get("mtp_depth"):
        echo(f"left out: {depth} modules of multi-token prediction, which only training uses")


def deepspeed_export(
    run: RunFolder, output: Output, step: Step = None, weights: Weights = "weight"
) -> None:
    """Write the fp32 weights in DeepSpeed's layout, with its zero_to_fp32.py."""
    from nextpt.evaluate.loaded_model import open_run
    from nextpt.exchange import export_deepspeed

    checkpoint = open_run(run, step, weights=weights)
    export_deepspeed(checkpoint, output)
    echo(
        f"step {checkpoint.step} written to {output}, {_format_size(output)}; next: python"
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
    from nextpt.base.files import atomic_write
    from nextpt.config import to_yaml
    from nextpt.data.dataset import check_dataset
    from nextpt.exchange import HFWeights, config_from_hf
    from nextpt.model import ModelSpec, count
    from nextpt.train.initial_weights import check_tokenizer

    if output.exists():
        raise ConfigError(f"{output} exists already; remove it or give another --output")
    weights, manifest = HFWeights(folder), DatasetManifest.load(data)
    config = config_from_hf(
        weights, name=output.stem, data=data, sequence_length=manifest.sequence_length
    )
    check_dataset(config, manifest)
    check_tokenizer(weights.folder.absolute(), data)
    try:
        with atomic_write(output) as file:
            file.write(to_yaml(config))
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}") from None
    parameters = count(ModelSpec.from_config(config)).parameters
    echo(
        f"{weights.architecture.name}, {parameters:,} parameters; check optimizer, schedule and"
        f" train in {output}, then: nextpt train --config {output}"
    )


def _format_size(folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{size / 1e6:,.1f} MB"


def register(app: typer.Typer) -> None:
    """Add the groups `export` and `import` to the application."""
    exports = add_group(
        app, "export", help="Write a checkpoint in another layout, see docs/export.md."
    )
    add_command(
        exports, "hf", hf_export, example="nextpt export hf --run runs/demo --output exported"
    )
    add_command(
        exports,
        "deepspeed",
        deepspeed_export,
        example=(
            "nextpt export deepspeed --run runs/demo --output exported &&"
            " python exported/zero_to_fp32.py exported weights"
        ),
    )
    imports = add_group(app, "import", help="Start from a pretrained model, see docs/export.md.")
    add_command(
        imports,
        "hf",
        hf_import,
        example="nextpt import hf Qwen3-0.6B --data data/mine --output continued.yaml",
    )
