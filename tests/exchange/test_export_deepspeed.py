"""DeepSpeed's own script converts the exported folder to our weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nextpt.exchange import export_deepspeed
from nextpt.model import build_decoder
from tests.support.commands import run_script
from tests.support.models import checkpoint_of, decoder


@pytest.mark.process
def test_zero_to_fp32_returns_our_weights(tmp_path: Path) -> None:
    """With an odd number of elements, and a tied matrix under both names."""
    config, model = decoder(tied_embeddings=True, bias=True, vocab_size=96, width=33, head_dim=6)
    assert sum(p.numel() for p in model.parameters()) % 2 == 1
    export_deepspeed(checkpoint_of(config, model, tmp_path / "checkpoints"), tmp_path / "ds")
    folder = tmp_path / "ds"
    completed = run_script(str(folder / "zero_to_fp32.py"), str(folder), str(tmp_path / "out"))
    assert completed.returncode == 0, completed.stderr
    reloaded = build_decoder(
        config.model_copy(update={"run": config.run.model_copy(update={"seed": 5})})
    )
    reloaded.load_state_dict(torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True))
    assert all(torch.equal(p, reloaded.get_parameter(name)) for name, p in model.named_parameters())


def test_the_module_state_is_exported(tmp_path: Path) -> None:
    """For DeepSpeed's load_checkpoint(load_module_only=True), which reads the first file alone."""
    config, model = decoder(tied_embeddings=True)
    export_deepspeed(checkpoint_of(config, model, tmp_path / "checkpoints"), tmp_path / "ds")
    assert (tmp_path / "ds" / "latest").read_text() == "global_step3"
    states = torch.load(
        tmp_path / "ds" / "global_step3" / "mp_rank_00_model_states.pt", weights_only=False
    )
    reloaded = build_decoder(
        config.model_copy(update={"run": config.run.model_copy(update={"seed": 5})})
    )
    reloaded.load_state_dict(states["module"])
    assert all(torch.equal(p, reloaded.get_parameter(name)) for name, p in model.named_parameters())
