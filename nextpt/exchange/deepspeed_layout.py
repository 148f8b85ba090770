"""Export in DeepSpeed's checkpoint layout, which its zero_to_fp32.py turns into a state dict.

The layout is that of a ZeRO-2 run on one rank: `latest`, and in the folder that it names
mp_rank_00_model_states.pt (parameter shapes, and the weights as the module has them) and
zero_pp_rank_0_mp_rank_00_optim_states.pt (the fp32 weights, one flat tensor). Names are those of
`Decoder`. Both files are pickles, as DeepSpeed requires; nextpt never reads one. The optimizer's
state is not exported.
"""

from __future__ import annotations

import shutil
from collections import OrderedDict
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import torch

from nextpt.base.json_files import sync
from nextpt.checkpoint.format import Checkpoint
from nextpt.config import Config, parse_config
from nextpt.exchange.folders import new_folder

ALIGNMENT = 2  # zero_to_fp32 expects groups padded to a multiple of 2 x ranks


def export_deepspeed(checkpoint: Checkpoint, output: Path) -> None:
    """Write a checkpoint in DeepSpeed's layout. The model is held in memory once, fp32.

    Args:
        checkpoint: What is exported.
        output: Folder to write; it must not exist.

    Raises:
        CheckpointError: It cannot be written; nothing is left behind.
    """
    config = parse_config(checkpoint.state["config"], f"{checkpoint.folder}/state.json")
    shapes = OrderedDict((name, torch.Size(shape)) for name, shape in checkpoint.shapes().items())
    sizes = [shape.numel() for shape in shapes.values()]
    flat = torch.zeros(-(-sum(sizes) // ALIGNMENT) * ALIGNMENT)
    module, offset = {}, 0
    for (name, shape), size in zip(shapes.items(), sizes, strict=True):
        module[name] = flat[offset : offset + size].view(shape)
        module[name].copy_(checkpoint.read_whole(name))
        offset += size
    shared = {"lm_head.weight": "embed_tokens.weight"} if config.model.tied_embeddings else {}
    release = version("deepspeed")
    with new_folder(output) as folder:
        tag = folder / f"global_step{checkpoint.step}"
        tag.mkdir()
        _save(
            tag / "mp_rank_00_model_states.pt",
            {
                "module": module | {alias: module[name] for alias, name in shared.items()},
                "buffer_names": [],
                "param_shapes": [shapes],
                "frozen_param_shapes": None,
                "frozen_param_fragments": None,
                "shared_params": shared,
                "optimizer": None,
                "lr_scheduler": None,
                "ds_config": {},
                "ds_version": release,
                "global_steps": checkpoint.step,
                "dp_world_size": 1,
                "mp_world_size": 1,
                "sparse_tensor_module_names": set(),
                "skipped_steps": 0,
                "global_samples": _consumed(checkpoint, config),
            },
        )
        _save(
            tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt",
            {
                "optimizer_state_dict": {
                    "zero_stage": 2,
                    "partition_count": 1,
                    "single_partition_of_fp32_groups": [flat],
                },
                "ds_config": {},
                "ds_version": release,
            },
        )
        (folder / "latest").write_text(tag.name)
        # Located, not imported: importing deepspeed starts its accelerator.
        script = distribution("deepspeed").locate_file("deepspeed/utils/zero_to_fp32.py")
        shutil.copyfile(str(script), folder / "zero_to_fp32.py")


def _consumed(checkpoint: Checkpoint, config: Config) -> int:
    """Sequences that were trained on."""
    planned = config.batches.consumed_tokens(checkpoint.step)
    return int(checkpoint.state.get("tokens", planned)) // config.data.sequence_length


def _save(path: Path, value: dict[str, Any]) -> None:
    """Pickle and sync; raises the OSError that torch would hide behind a RuntimeError."""
    try:
        with open(path, "wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    sync(path)
