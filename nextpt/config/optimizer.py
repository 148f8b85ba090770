"""Config sections `optimizer` and `schedule`."""

from __future__ import annotations

from typing import Literal

from nextpt.config.section import Section, key


class OptimizerSection(Section):
    """The optimizer; `kind` says which (nextpt/optim/registry.py)."""

    kind: Literal["adamw"] = key(
        "adamw",
        description="adamw: matrices decay, vectors (norms, biases) do not",
        aliases=("optimizer_type", "optim_type", "type", "name"),
    )
    lr: float = key(
        gt=0,
        description="peak learning rate",
        aliases=("learning_rate", "max_lr", "peak_lr", "base_lr"),
    )
    betas: tuple[float, float] = key(
        (0.9, 0.95),
        description="decay rates of the first and second moments (arXiv 1412.6980)",
        aliases=("beta1", "beta2", "beta_1", "beta_2", "adam_beta1", "adam_beta2"),
    )
    eps: float = key(
        1e-8,
        gt=0,
        description="epsilon added to the root of the second moment",
        aliases=("epsilon", "adam_eps", "adam_epsilon"),
    )
    weight_decay: float = key(
        0.1, ge=0, description="decoupled weight decay", aliases=("wd", "decay_rate")
    )
    decay_embeddings: bool = key(False, description="embeddings decay too")
    grad_clip: float | None = key(
        1.0,
        gt=0,
        description="largest global gradient norm; null: no clipping",
        aliases=(
            "clip_grad",
            "gradient_clipping",
            "max_grad_norm",
            "grad_norm_clip",
            "gradient_clip_val",
            "clip_grad_norm",
            "max_norm",
        ),
    )


class ScheduleSection(Section):
    """Learning-rate schedule: warm-up, then cosine, constant, or stable and decay.

    The last is WSD (warm-up, stable, decay; arXiv 2404.06395).
    """

    kind: Literal["cosine", "wsd", "constant"] = key(
        "cosine",
        description="shape after the warm-up",
        aliases=("lr_scheduler_type", "scheduler_type", "lr_decay_style", "lr_schedule"),
    )
    unit: Literal["steps", "tokens"] = key("steps", description="unit of warmup and decay")
    warmup: int = key(
        0,
        ge=0,
        unit="schedule.unit",
        description="length of the linear warm-up",
        aliases=(
            "warmup_steps",
            "warmup_iters",
            "num_warmup_steps",
            "lr_warmup_steps",
            "warmup_tokens",
            "warmup_ratio",
        ),
    )
    decay: int | None = key(
        None,
        ge=1,
        unit="schedule.unit",
        description="wsd: length of the final decay; 20 % of the run unless set",
        aliases=("decay_steps", "lr_decay_iters", "cooldown", "cooldown_steps", "lr_decay_steps"),
    )
    final_ratio: float = key(
        0.1,
        ge=0,
        le=1,
        description="last learning rate / peak",
        aliases=("min_lr", "min_lr_ratio", "final_lr", "alpha_f", "min_ratio"),
    )
