"""DeepSpeed's JSON configuration, derived from the run's config here and nowhere else."""

from __future__ import annotations

from typing import Any

import torch

from nextpt.config import Config
from nextpt.train.memory import LIVE_PARAMETERS, reduce_bucket


def deepspeed_config(config: Config, data_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a run; keys that are not in it have DeepSpeed's defaults.

    DeepSpeed clips nothing: `nextpt.optim` does.

    Args:
        config: The run.
        data_size: Number of ranks that divide the data among them.
    """
    bf16 = config.train.precision == "bf16"
    stage = config.train.zero_stage
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps(data_size),
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16, "check_grad_overflow": False},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "reduce_scatter": True,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            "memory_efficient_linear": False,
            "reduce_bucket_size": reduce_bucket(config),
            "stage3_max_live_parameters": LIVE_PARAMETERS,
            "stage3_max_reuse_distance": LIVE_PARAMETERS,
            "zero_hpz_partition_size": config.train.hpz_ranks or 1,
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
