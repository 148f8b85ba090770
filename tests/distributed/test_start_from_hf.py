"""Runs that start from a Hugging Face folder: exact weights, step 0, errors on all ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nextpt.checkpoint.selection import open_checkpoint
from nextpt.config import Config, parse_config
from nextpt.exchange import HFWeights, config_from_hf, export_hf
from nextpt.model import Decoder
from tests.support.models import checkpoint_of, decoder
from tests.support.ranks import train_all
from tests.support.tokenizers import KINDS

pytestmark = pytest.mark.process

# Shape of the folder's model: more rows than the tokenizer has tokens, tied, and an architecture
# that stores changed values.
SHAPE = {"vocab_size": 520, "tied_embeddings": True, "logit_softcap": 5.0, "max_position": 64}
BETA = 0.9


@pytest.fixture(scope="module")
def start(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Decoder]:
    root = tmp_path_factory.mktemp("start")
    config, model = decoder(**SHAPE)
    export_hf(
        checkpoint_of(config, model, root / "checkpoints"), dataset / "tokenizer.json", root / "hf"
    )
    return root / "hf", model


def config_of(folder: Path, dataset: Path, run: Path, **sections: dict[str, Any]) -> Config:
    """The config of `nextpt import hf`: one step on two ranks, with a learning rate of 0."""
    values = config_from_hf(
        HFWeights(folder), name="run", data=dataset, sequence_length=64
    ).model_dump(mode="json")
    values["run"]["dir"] = str(run)
    values["optimizer"] |= {"lr": 1e-30, "betas": [BETA, 0.95], "grad_clip": None}
    values["schedule"] = {"kind": "constant"}
    values["train"] |= {
        "steps": 1,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "precision": "fp32",
        "log_every": 1,
    }
    for section, changes in sections.items():
        values[section] |= changes
    return parse_config(values, "test")


@pytest.fixture(scope="module")
def jobs(
    start: tuple[Path, Decoder], dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str | None]]:
    """All two-rank jobs of this file; the messages of those that fail."""
    root, (folder, _) = tmp_path_factory.mktemp("started"), start
    other = root / "other"
    shutil.copytree(folder, other)
    KINDS["gpt2"](other / "tokenizer.json")
    named = {
        f"{precision}-{stage}": config_of(
            folder,
            dataset,
            root / f"{precision}-{stage}",
            train={"zero_stage": stage, "precision": precision},
        )
        for precision, stage in (("fp32", 0), ("fp32", 3))
    }
    named["bf16-2"] = config_of(
        folder,
        dataset,
        root / "bf16-2",
        train={"zero_stage": 2, "precision": "bf16"},
        model={"rope_base": 5e5},
    )
    named["resumed"] = config_of(
        folder, dataset, root / "fp32-3", train={"steps": 2, "zero_stage": 3}
    )
    named["depth"] = config_of(folder, dataset, root / "depth", model={"depth": 3})
    named["missing"] = config_of(
        folder, dataset, root / "missing", train={"init_from": str(root / "none")}
    )
    named["tokenizer"] = config_of(
        folder, dataset, root / "tokenizer", train={"init_from": str(other)}
    )
    named["vocabulary"] = config_of(folder, dataset, root / "vocabulary", train={"init_from": None})
    return root, dict(zip(named, train_all(list(named.values()), 2, root / "logs"), strict=True))


@pytest.mark.parametrize("job", ["fp32-0", "bf16-2"])
def test_the_first_step_starts_from_the_weights_of_the_folder(
    job: str, jobs: tuple[Path, dict[str, str | None]], start: tuple[Path, Decoder]
) -> None:
    root, messages = jobs
    assert messages[job] is None
    checkpoint = open_checkpoint(root / job / "checkpoints")
    assert checkpoint.step == 1 and checkpoint.state["scalars"] == {"optimizer_updates": 1.0}
    for name, p in start[1].named_parameters():
        assert torch.equal(checkpoint.read_whole(name), p), name
        # After one update of fresh moments: m = (1 - beta1) g and v = (1 - beta2) g^2.
        m, v = checkpoint.read_whole(name, "exp_avg"), checkpoint.read_whole(name, "exp_avg_sq")
        torch.testing.assert_close(v, (1 - 0.95) * (m / (1 - BETA)) ** 2, rtol=1e-4, atol=0)
    assert checkpoint.read_whole("embed_tokens.weight", "exp_avg").any()


def test_a_start_resumes_from_its_own_checkpoints(
    jobs: tuple[Path, dict[str, str | None]], start: tuple[Path, Decoder]
) -> None:
    root, messages = jobs
    assert messages["fp32-3"] is None and messages["resumed"] is None
    checkpoint = open_checkpoint(root / "fp32-3" / "checkpoints")
    assert checkpoint.step == 2 and checkpoint.state["scalars"] == {"optimizer_updates": 2.0}
    assert all(
        torch.equal(checkpoint.read_whole(name), p) for name, p in start[1].named_parameters()
    )
    log = (root / "logs" / "rank-0.log").read_text()
    assert log.count("starting from the weights in") == 3 and log.count("resuming") == 1


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ("depth", "holds another model: model.depth = 3, there 2"),
        ("missing", "none does not exist; give a local Hugging Face folder"),
        (
            "tokenizer",
            (
                "is not the tokenizer of the model in train.init_from: prepare the data with"
                " --tokenizer"
            ),
        ),
        ("vocabulary", "model.vocab_size = 520, but the tokenizer of"),
    ],
)
def test_user_errors_are_reported_before_anything_is_written(
    job: str, message: str, jobs: tuple[Path, dict[str, str | None]]
) -> None:
    root, messages = jobs
    assert message in (messages[job] or "")
    assert not any(
        (root / job / name).exists() for name in ("config.yaml", "checkpoints", "metrics.jsonl")
    )


def test_changed_use_of_the_same_weights_is_reported(
    jobs: tuple[Path, dict[str, str | None]],
) -> None:
    root, messages = jobs
    assert messages["bf16-2"] is None
    assert (
        "warning: model.rope_base = 500000.0, there 10000.0 in train.init_from"
        in (root / "logs" / "rank-0.log").read_text()
    )
