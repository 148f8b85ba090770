"""Loaded models: a run, its export and a transformers model open by one call and score alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nextpt.base.errors import CheckpointError, DataError
from nextpt.base.files import sha256_file
from nextpt.evaluate.documents import score_documents
from nextpt.evaluate.hugging_face import HuggingFaceModel
from nextpt.evaluate.loaded_model import open_model, open_run
from nextpt.evaluate.texts import encode_document
from nextpt.exchange import export_hf
from nextpt.model import Decoder
from tests.support.models import checkpoint_of
from tests.support.runs import make_run
from tests.support.tokenizers import KINDS

TEXT = "Whan that Aprille with his shoures soote \u00e9\n" * 4


def nats_of(source) -> float:
    tokens, sizes = encode_document(source.tokenizer, TEXT)
    return score_documents(
        source.model, [tokens], [sizes], source.tokenizer.token_bytes(), window=16, stride=8
    )[0].nats


@pytest.mark.thorough
def test_a_run_and_its_export_score_alike(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    export_hf(open_run(tmp_path / "run"), tmp_path / "run" / "tokenizer.json", tmp_path / "hf")
    run, exported = open_model(tmp_path / "run"), open_model(tmp_path / "hf")
    assert (
        run.is_run and run.step == 3 and not exported.is_run and isinstance(exported.model, Decoder)
    )
    assert nats_of(run) == pytest.approx(nats_of(exported), rel=1e-9)


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    folder = tmp_path / "gpt2"
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=1024, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    ).save_pretrained(folder)
    KINDS["byte_level"](folder / "tokenizer.json")
    return folder


@pytest.mark.thorough
def test_an_architecture_that_nextpt_lacks_is_run_by_transformers(gpt2: Path) -> None:
    source = open_model(gpt2)
    assert isinstance(source.model, HuggingFaceModel) and source.model.max_position == 32
    model = GPT2LMHeadModel.from_pretrained(gpt2).eval()
    tokens, sizes = encode_document(source.tokenizer, "a short text")
    ids = torch.from_numpy(tokens.astype(np.int64)).unsqueeze(0)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            model(ids).logits[0, :-1], ids[0, 1:], reduction="none"
        )[:-1].sum()
    scores, _ = score_documents(
        source.model, [tokens], [sizes], source.tokenizer.token_bytes(), window=32, stride=16
    )
    assert scores.nats == pytest.approx(float(expected), rel=1e-6)
    with pytest.raises(
        CheckpointError, match="model_type = 'gpt2' cannot be imported; these can: apertus"
    ):
        open_model(gpt2, decoder_only=True)


def test_folders_that_cannot_be_opened_are_named(gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="which has no steps"):
        open_model(gpt2, 5)
    config = json.loads((gpt2 / "config.json").read_text())
    (gpt2 / "model.safetensors").rename(gpt2 / "kept")
    torch.save({}, gpt2 / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="gpt2 cannot be read by transformers"):
        open_model(gpt2)
    (gpt2 / "kept").rename(gpt2 / "model.safetensors")
    (gpt2 / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json does not exist"):
        open_model(gpt2)
    (gpt2 / "config.json").write_text(json.dumps(config | {"model_type": "nobody_knows"}))
    with pytest.raises(CheckpointError, match="cannot be read by transformers"):
        open_model(gpt2)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_model(tmp_path / "nothing")


def test_a_tokenizer_that_is_too_large_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    ).save_pretrained(folder)
    KINDS["byte_level"](folder / "tokenizer.json")
    with pytest.raises(DataError, match="not the tokenizer of this model"):
        open_model(folder)


def test_a_tokenizer_that_was_changed_after_training_is_refused(tmp_path: Path) -> None:
    """As much as one character of a pattern changes what generation gives."""
    run = tmp_path / "run"
    config, model, _ = make_run(run)
    path = run / "tokenizer.json"
    data = {"tokenizer_sha256": sha256_file(path)}
    checkpoint_of(config, model, run / "checkpoints", step=5, data=data)
    assert open_model(run).step == 5
    path.write_text(path.read_text() + "\n")
    for read in (open_model, lambda run: export_hf(open_run(run), path, tmp_path / "hf")):
        with pytest.raises(DataError, match=r"tokenizer\.json is not the tokenizer that the model"):
            read(run)
    assert open_model(run, 3).step == 3  # of before the hash was recorded
