"""Config section `validation`: loss on the validation split during training."""

from __future__ import annotations

from nextpt.config.section import Section, key


class ValidationSection(Section):
    """Loss on sequences of the validation split, per domain."""

    every_steps: int | None = key(
        None,
        ge=1,
        unit="optimizer steps",
        description="interval between validations; none unless set",
        aliases=(
            "eval_interval",
            "eval_steps",
            "eval_every",
            "val_interval",
            "val_every",
            "eval_freq",
            "val_check_interval",
        ),
    )
    sequences: int = key(
        64,
        ge=1,
        unit="sequences",
        deprecated=("rows",),
        description="sequences of the validation split per domain",
        aliases=(
            "eval_iters",
            "val_iters",
            "eval_batches",
            "max_eval_samples",
            "limit_val_batches",
        ),
    )
    averages: bool = key(
        False,
        description="validate the averages of train.ema too, at the cost of one more validation per"
        " decay",
    )
