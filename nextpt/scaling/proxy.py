"""Proxy runs: a small, short run for tuning, and factors from its best values to the large run's.

The proxy has the shape for which the large config's options are meant (`model.base_width`, with
CompleteP `model.base_depth` too), so that they transfer over the shape by
nextpt/model/parametrization.py. It is shorter, and its batch smaller. With D tokens, B sequences
per step, S steps and N parameters, four rules make up for that:

    batch           B_proxy / B_large = (D_proxy / D_large)^0.383    (arXiv 2505.13738)
    learning rate   x (D_large / D_proxy)^-h at one batch            (arXiv 2409.19913)
                    x (B_large / B_proxy)^0.5                        (arXiv 2205.10287)
    decay           lr x weight_decay x S in proportion to (D / N)^0.53  (arXiv 2405.13698 for the
                    time scale 1 / (lr weight_decay S), 2505.13738 for its exponent)

The root of the batch is derived for Adam below its critical batch size, and assumed for Muon.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from nextpt.base.errors import ScalingError
from nextpt.config import Config, OptimizerSection, parse_config
from nextpt.model import ModelSpec, count
from nextpt.scaling.shapes import with_depth, with_width

TOKENS_PER_PARAMETER = 20  # of a proxy whose steps are not set (arXiv 2203.15556)
BATCH_EXPONENT = 0.383
# h of models from 760M parameters on, at one batch size (arXiv 2409.19913)
HORIZON_EXPONENT = 0.32
# From none, which arXiv 2503.04715 comes to (lr ~ D^0.307 at B ~ D^0.571, of which the root of the
# batch is D^0.286), to that of 50M parameters (arXiv 2409.19913, table 5)
PUBLISHED_HORIZON_EXPONENTS = (0.0, 0.7)
ADAM_BATCH_EXPONENT = 0.5
TIME_SCALE_EXPONENT = 0.53
# Shortest warm-up of a proxy, as a share of its steps, unless the large run's has fewer steps: in
# proportion, that of a short proxy of a long run would be a few steps, which lowers its best rate.
MIN_WARMUP_SHARE = 0.05
GROUPS = ("embedding", "output", "vectors", "muon")


@dataclass(frozen=True)
class Transfer:
    """Factors from the best values of a proxy to those of the large run.

    Attributes:
        tokens: Tokens of the large run / tokens of the proxy.
        batch: The same of sequences per step, that of `train.global_batch_size`.
        horizon_exponent: h, with which learning rates fall with the tokens.
        lr_for_tokens: Factor of learning rates for the longer run.
        lr_for_batch: Factor of learning rates for the larger batch.
        lr: Both factors together.
        weight_decay: Factor of decays.
        lr_range: `lr` with the smallest and the largest published exponent of the tokens.
    """

    tokens: float
    batch: float
    horizon_exponent: float
    lr_for_tokens: float
    lr_for_batch: float
    lr: float
    weight_decay: float
    lr_range: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


def transfer(proxy: Config, large: Config, horizon_exponent: float = HORIZON_EXPONENT) -> Transfer:
    """Compute the factors for a proxy.

    Args:
        proxy: Config of the proxy.
        large: Config of the large run.
        horizon_exponent: h of lr ~ D^-h.
    """
    tokens = large.total_tokens / proxy.total_tokens
    batch = large.train.global_batch_size / proxy.train.global_batch_size
    steps = large.total_steps / proxy.total_steps
    per_parameter = tokens * parameters_of(proxy) / parameters_of(large)
    for_tokens, for_batch = tokens**-horizon_exponent, batch**ADAM_BATCH_EXPONENT
    lr = for_tokens * for_batch
    bounds = sorted(tokens**-exponent * for_batch for exponent in PUBLISHED_HORIZON_EXPONENTS)
    return Transfer(
        tokens=tokens,
        batch=batch,
        horizon_exponent=horizon_exponent,
        lr_for_tokens=for_tokens,
        lr_for_batch=for_batch,
        lr=lr,
        weight_decay=per_parameter**TIME_SCALE_EXPONENT / (lr * steps),
        lr_range=(bounds[0], bounds[1]),
    )


def plan_proxy(
    large: Config,
    *,
    ranks: int,
    steps: int | None = None,
    batch_size: int | None = None,
    same_shape: bool = False,
    horizon_exponent: float = HORIZON_EXPONENT,
) -> Config:
    """Return the config of the proxy.

    Its learning rates and decays are those that would transfer to the large config's, to the
    nearest power of 2 times these: the middle of a search is the config as it is.

    Args:
        large: The large run; its length must be known (`count_epoch`).
        ranks: Processes that train it.
        steps: Optimizer steps; None for `TOKENS_PER_PARAMETER`.
        batch_size: Sequences per step; None for the rule above.
        same_shape: Keep the shape of the large run.
        horizon_exponent: h of lr ~ D^-h.

    Raises:
        ConfigError: The proxy is no valid run.
        ScalingError: The large config does not say for which shape its values are meant, or starts
            from weights, or is shorter than the proxy.
    """
    _check_start(large)
    shape = large if same_shape else with_base_shape(large)
    if same_shape and steps is None:
        raise ScalingError("--same-shape needs --steps, the optimizer steps of a trial")
    if steps is not None and steps > large.total_steps:
        raise ScalingError(
            f"--steps {steps} is more than the {large.total_steps} steps of the large run; a proxy"
            " is shorter"
        )
    tokens = min(TOKENS_PER_PARAMETER * parameters_of(shape), large.total_tokens)
    batch = batch_size or _batch_size(large, steps, tokens, ranks)
    if steps is None:
        steps = min(max(round(tokens / (batch * large.data.sequence_length)), 1), large.total_steps)
    sections = shape.model_dump(mode="json")
    sections["train"] |= {
        "steps": steps,
        "tokens": None,
        "epochs": None,
        "epoch_sequences": None,
        "stop_at": None,
        "global_batch_size": batch,
        "batch_schedule": None,
        "batch_growth": None,
        "ema": None,
        "hpz_ranks": None,
    }
    sections["schedule"] |= _schedule(large, steps)
    sections["data"]["stages"] = _stages(large, steps)
    # A mirror is that of the large run. A trial that diverged is not worth a second attempt.
    sections["checkpoint"]["mirror"] = None
    sections["guard"]["max_rollbacks"] = 0
    sections["validation"] |= {"every_steps": steps, "averages": False}
    sections["run"] |= {"name": "proxy", "dir": None}
    proxy = parse_config(sections, "the proxy")
    proxy.accumulation_steps(ranks)
    factors = transfer(proxy, large, horizon_exponent)
    sections["optimizer"] = _with_values(
        sections["optimizer"],
        scaled_values(large.optimizer, "lr", _power_of_2(1 / factors.lr))
        | scaled_values(large.optimizer, "weight_decay", _power_of_2(1 / factors.weight_decay)),
    )
    return parse_config(sections, "the proxy")


def with_base_shape(large: Config) -> Config:
    """The config at the shape for which its learning rates are meant.

    Raises:
        ScalingError: It names none.
    """
    model = large.model
    head_dim = model.resolved_head_dim
    if model.parametrization == "standard" or model.base_width is None:
        width = min(256, model.width)
        raise ScalingError(
            "model.parametrization = standard: the best learning rate of a narrow model is not"
            " that of a wide one, so a proxy would not tell it; set model.parametrization=mup"
            f" model.base_width={width} (docs/recipe.md), or give --same-shape and --steps to tune"
            " in shorter runs of the whole model"
        )
    if model.heads * head_dim != model.width:
        raise ScalingError(
            f"model.heads x model.head_dim = {model.heads} x {head_dim} is not model.width ="
            f" {model.width}, so there is no proxy of the same proportions; give --same-shape and"
            " --steps to tune in shorter runs of the whole model"
        )
    small = with_width(large, model.base_width, "model.base_width =")
    if model.parametrization == "completep" and model.base_depth is not None:
        small = with_depth(small, model.base_depth)
    return small


def parameters_of(config: Config) -> int:
    """All parameters of the model of a run."""
    return count(ModelSpec.from_config(config)).parameters


def set_values(section: OptimizerSection, name: str) -> dict[str, float]:
    """Values of an option that the optimizer and its groups set, without those of 0.

    Args:
        section: Options of the optimizer.
        name: "lr" or "weight_decay".

    Returns:
        Dotted key -> value; that of `optimizer` first.
    """
    groups = {f"optimizer.{group}": getattr(section, group) for group in GROUPS}
    return {
        f"{prefix}.{name}": value
        for prefix, options in {"optimizer": section, **groups}.items()
        if options is not None and (value := getattr(options, name))
    }


def scaled_values(section: OptimizerSection, name: str, factor: float) -> dict[str, float]:
    """The values of `set_values` times a factor, so that groups keep their ratios."""
    return {key: rounded(value * factor) for key, value in set_values(section, name).items()}


def rounded(value: float) -> float:
    """The value with three significant digits, which names of runs can hold."""
    return float(f"{value:.3g}")


def _power_of_2(factor: float) -> float:
    return 2.0 ** round(math.log2(factor))


def _with_values(section: dict[str, Any], values: dict[str, float]) -> dict[str, Any]:
    """The section `optimizer` with other values of dotted keys."""
    for key, value in values.items():
        *groups, name = key.split(".")[1:]
        (section[groups[0]] if groups else section)[name] = value
    return section


def _check_start(large: Config) -> None:
    """Refuse runs that begin with weights: a proxy of another shape cannot."""
    for key in ("init_from", "decay_from"):
        if getattr(large.train, key) is not None:
            raise ScalingError(
                f"train.{key} is set: the run starts from weights that a proxy does not have;"
                " tune a run that starts from random weights"
            )


def _batch_size(large: Config, steps: int | None, tokens: float, ranks: int) -> int:
    """The large run's batch, halved as often as the rule asks and ranks can divide it.

    Args:
        large: The large run.
        steps: Optimizer steps of the proxy, if they are set.
        tokens: Tokens of the proxy where they are not.
        ranks: Processes that train it.
    """
    batch, divisor = large.train.global_batch_size, large.train.micro_batch_size * ranks
    # With steps in place of tokens: b = d^e and d = s b give b = s^(e / (1 - e))
    ratio = (
        (tokens / large.total_tokens) ** BATCH_EXPONENT
        if steps is None
        else (steps / large.total_steps) ** (BATCH_EXPONENT / (1 - BATCH_EXPONENT))
    )
    for _ in range(max(round(-math.log2(ratio)), 0)):
        if batch % 2 or (batch // 2) % divisor:
            break
        batch //= 2
    return batch


def _schedule(large: Config, steps: int) -> dict[str, Any]:
    """Lengths of the schedule in steps of the proxy, in proportion to its length."""
    schedule, batches = large.schedule, large.batches
    total = large.total_tokens if schedule.unit == "tokens" else large.total_steps
    warmup_steps = schedule.warmup
    if schedule.unit == "tokens":
        warmup_steps = batches.steps_for_tokens(schedule.warmup)
    warmup = max(
        round(schedule.warmup * steps / total),
        min(warmup_steps, round(MIN_WARMUP_SHARE * steps)),
    )
    lengths: dict[str, Any] = {"unit": "steps", "warmup": warmup}
    if schedule.decay is not None:
        decay = max(round(schedule.decay * steps / total), 1)
        lengths["decay"] = max(min(decay, steps - warmup), 1)
    if schedule.power_from is not None:
        lengths["power_from"] = max(round(schedule.power_from * steps / total), warmup, 1)
    return lengths


def _stages(large: Config, steps: int) -> list[dict[str, Any]] | None:
    """Stages of the data in proportion to the proxy's length; the last is the rest of it."""
    if large.data.stages is None:
        return None
    stages = [stage.model_dump(mode="json") for stage in large.data.stages]
    for stage in stages[:-1]:
        stage["steps"] = max(round(stage["steps"] * steps / large.total_steps), 1)
    stages[-1]["steps"] = None
    return stages
