"""`nextpt export` and `nextpt import`: to other layouts, and to a config that trains."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launcher.cli import app
from nextpt.config import load_config
from nextpt.exchange import export_hf, load_hf
from nextpt.model import ModelSpec
from tests.support.models import checkpoint_of, decoder
from tests.support.tokenizers import KINDS


def nextpt(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as of a training job, with an untrained model."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    config, model = decoder(vocab_size=512, qk_norm=True)
    checkpoint_of(config, model, folder / "checkpoints")
    shutil.copyfile(dataset / "tokenizer.json", folder / "tokenizer.json")
    return folder


@pytest.mark.thorough
def test_from_a_run_to_a_folder_to_a_config(run: Path, dataset: Path, tmp_path: Path) -> None:
    config, model = decoder(vocab_size=512, qk_norm=True, max_position=64)
    shutil.copytree(run, tmp_path / "run")
    checkpoint_of(config, model, tmp_path / "run" / "checkpoints")
    result = nextpt("export", "hf", "--run", tmp_path / "run", "--output", tmp_path / "hf")
    assert (
        result.exit_code == 0
        and "step 3 written to" in result.output
        and "as Qwen3ForCausalLM, fp32, 0." in result.output
    ), result.output
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    result = nextpt(
        "import", "hf", tmp_path / "hf", "--data", dataset, "--output", tmp_path / "go-on.yaml"
    )
    assert (
        result.exit_code == 0
        and "Qwen3ForCausalLM" in result.output
        and "then: nextpt train --config" in result.output
    ), result.output
    loaded = load_config(tmp_path / "go-on.yaml")
    assert (
        loaded.train.init_from == str(tmp_path / "hf")
        and loaded.run.name == "go-on"
        and loaded.data.path == str(dataset)
    )
    assert ModelSpec.from_config(loaded) == load_hf(tmp_path / "hf").spec
    second = nextpt(
        "import", "hf", tmp_path / "hf", "--data", dataset, "--output", tmp_path / "go-on.yaml"
    )
    assert second.exit_code == 2 and "go-on.yaml exists already" in second.stderr


@pytest.mark.thorough
def test_to_bf16_and_to_deepspeed(run: Path, tmp_path: Path) -> None:
    result = nextpt(
        "export", "hf", "--run", run, "--step", 3, "--dtype", "bf16", "--output", tmp_path / "hf"
    )
    assert result.exit_code == 0 and "bf16" in result.output, result.output
    result = nextpt("export", "deepspeed", "--run", run, "--output", tmp_path / "ds")
    assert result.exit_code == 0 and "zero_to_fp32.py" in result.output, result.output
    assert (tmp_path / "ds" / "latest").is_file()


@pytest.mark.thorough
@pytest.mark.parametrize("layout", ["hf", "deepspeed"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "none", "--output", "out"], "run folder none does not exist"),
        (["--run", "empty", "--output", "out"], "holds no checkpoint; train first"),
        (
            ["--run", "RUN", "--step", "4", "--output", "out"],
            "has no checkpoint of that step; there are: 3",
        ),
        (["--run", "RUN", "--output", "empty"], "empty exists already"),
        (["--run", "RUN", "--output", "none/out"], "none for the output does not exist"),
    ],
)
def test_user_errors_of_exporting_end_with_one_line(
    layout: str,
    arguments: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    result = nextpt("export", layout, *[str(run) if a == "RUN" else a for a in arguments])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and message in result.stderr, (
        result.output
    )
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_unknown_types_and_inexpressible_models_are_refused(run: Path, tmp_path: Path) -> None:
    result = nextpt("export", "hf", "--run", run, "--output", tmp_path / "hf", "--dtype", "int4")
    assert (
        result.exit_code == 2
        and "--dtype int4 is not known; use one of fp32, bf16" in result.stderr
    )
    checkpoint_of(
        *decoder(vocab_size=512, logit_softcap=1.0, bias=True), tmp_path / "run" / "checkpoints"
    )
    shutil.copyfile(run / "tokenizer.json", tmp_path / "run" / "tokenizer.json")
    result = nextpt("export", "hf", "--run", tmp_path / "run", "--output", tmp_path / "hf")
    assert (
        result.exit_code == 2
        and "model.logit_softcap together with model.bias = true" in result.stderr
    )
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.thorough
def test_user_errors_of_importing_end_with_one_line(
    run: Path, dataset: Path, tmp_path: Path
) -> None:
    config, model = decoder(vocab_size=512, max_position=64)
    KINDS["gpt2"](tmp_path / "other.json")
    for name, tokenizer in (("hf", dataset / "tokenizer.json"), ("other", tmp_path / "other.json")):
        export_hf(
            checkpoint_of(config, model, tmp_path / "checkpoints"), tokenizer, tmp_path / name
        )
    short, shorter = decoder(vocab_size=512, max_position=32)
    export_hf(
        checkpoint_of(short, shorter, tmp_path / "checkpoints"),
        dataset / "tokenizer.json",
        tmp_path / "short",
    )
    for folder, data, output, message in (
        (tmp_path / "none", dataset, "x.yaml", "does not exist; give a local Hugging Face folder"),
        (tmp_path / "hf", tmp_path / "none", "x.yaml", "none is not there"),
        (tmp_path / "hf", dataset, "none/x.yaml", "x.yaml cannot be written: No such file"),
        (
            tmp_path / "other",
            dataset,
            "x.yaml",
            "is not the tokenizer of the model in train.init_from",
        ),
        (
            tmp_path / "short",
            dataset,
            "x.yaml",
            "data.sequence_length = 64 is above model.max_position = 32",
        ),
    ):
        result = nextpt("import", "hf", folder, "--data", data, "--output", tmp_path / output)
        assert (
            result.exit_code == 2 and result.stderr.count("\n") == 1 and message in result.stderr
        ), result.output
        assert not (tmp_path / "x.yaml").exists()


@pytest.mark.parametrize("command", [("export", "hf"), ("export", "deepspeed"), ("import", "hf")])
def test_help_has_an_example(command: tuple[str, str]) -> None:
    result = nextpt(*command, "--help")
    assert result.exit_code == 0 and f"example: nextpt {command[0]}" in result.output
