"""Coordinate check: sizes of activations and of their changes over widths and depths.

Under a parametrization that lets hyperparameters transfer, a few optimizer steps change activations
alike at any width (arXiv 2203.03466, appendix D.1). Models of several widths, or depths, are
stepped by the project's optimizer at the peak learning rate, without decay and on one batch. The
slope of log(mean |x_t - x_0|) against log(width) is near 0 where they change alike. It is judged
from step 3 on: in the first steps output matrices that are random or zero hide what updates do.
Logits are judged for growth only: what random initial output matrices add to them falls with the
width even under the right rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from kernels.attention import PackedDocuments
from nextpt.base.errors import ScalingError
from nextpt.config import Config, parse_config
from nextpt.data.batch import IGNORE_INDEX, Batch
from nextpt.data.loader import Loader
from nextpt.model import Decoder, build_decoder
from nextpt.objective import local_weight_sum, next_token_loss
from nextpt.optim.guarded import GuardedOptimizer, Shard
from nextpt.optim.registry import optimizer_spec
from nextpt.scaling.shapes import group_width, with_depth, with_width
from nextpt.train.dynamics import component_of

Axis = Literal["width", "depth"]
FIRST_JUDGED_STEP = 3
# Largest slope of activations that change alike; finite widths scatter by about 0.1
LARGEST_SLOPE = 0.2
LAST_BLOCK = "last_block"
LOGITS = "logits"
JUDGED = (LAST_BLOCK, "final_norm", LOGITS)


@dataclass(frozen=True)
class Measurement:
    """Steps of one model.

    Attributes:
        width: Width of the model.
        depth: Depth of the model.
        seed: Seed of its initial weights.
        losses: Loss before every step and after the last, nats per token.
        sizes: Place -> mean |x_t| of its activations after t = 0, 1, ... steps.
        changes: Place -> mean |x_t - x_0|.
        updates: Component -> mean |W_t - W_(t-1)| of its weights for t = 1, 2, ...
    """

    width: int
    depth: int
    seed: int
    losses: list[float]
    sizes: dict[str, list[float]]
    changes: dict[str, list[float]]
    updates: dict[str, list[float]]

    def to_json(self) -> dict[str, Any]:
        """Return the fields for JSON; numbers that are not finite are null."""
        lists = {
            name: {place: [*map(_finite, sizes)] for place, sizes in getattr(self, name).items()}
            for name in ("sizes", "changes", "updates")
        }
        return {**asdict(self), "losses": [*map(_finite, self.losses)], **lists}


@dataclass(frozen=True)
class Sweep:
    """Measurements of models that differ in width, or in depth.

    Attributes:
        axis: In what they differ.
        measurements: Of all values of the axis and all seeds.
    """

    axis: Axis
    measurements: tuple[Measurement, ...]

    @property
    def values(self) -> list[int]:
        """Widths or depths, ascending."""
        return sorted({getattr(m, self.axis) for m in self.measurements})

    @property
    def steps(self) -> int:
        """Optimizer steps of every model."""
        return len(self.measurements[0].losses) - 1

    @property
    def places(self) -> list[str]:
        """Places that all models have, in the order of the forward pass."""
        first, *others = (m.changes for m in self.measurements)
        return [place for place in first if all(place in changes for changes in others)]

    def mean(self, quantity: str, place: str, step: int, value: int) -> float:
        """Geometric mean over seeds.

        Args:
            quantity: "sizes", "changes" or "updates".
            place: Place, or component of updates.
            step: Index in the measured list.
            value: Width or depth.
        """
        sizes = [
            getattr(m, quantity)[place][step]
            for m in self.measurements
            if getattr(m, self.axis) == value
        ]
        return math.exp(sum(map(_log, sizes)) / len(sizes))

    def slope(self, place: str, step: int) -> float:
        """Least-squares slope of log mean change against log width (or depth); NaN if undefined."""
        changes = [_log(self.mean("changes", place, step, value)) for value in self.values]
        if not np.isfinite(changes).all():
            return math.nan
        return float(np.polyfit(np.log(self.values), changes, 1)[0])

    def judged_slope(self, place: str) -> float:
        """Mean of the slopes from step `FIRST_JUDGED_STEP` on."""
        steps = range(FIRST_JUDGED_STEP, self.steps + 1)
        return sum(self.slope(place, step) for step in steps) / len(steps)

    @property
    def growing(self) -> list[str]:
        """Judged places whose change grows along the axis, or is not a number."""
        return [place for place in JUDGED if not self.judged_slope(place) <= LARGEST_SLOPE]

    @property
    def shrinking(self) -> list[str]:
        """Judged hidden states whose change shrinks along the axis."""
        hidden = [place for place in JUDGED if place != LOGITS]
        return [place for place in hidden if self.judged_slope(place) < -LARGEST_SLOPE]

    @property
    def is_stable(self) -> bool:
        """Whether activations change alike over the whole axis."""
        return not self.growing and not self.shrinking

    def to_json(self) -> dict[str, Any]:
        """Return slopes, verdict and measurements; undefined slopes are null."""
        slopes = {
            place: [_finite(self.slope(place, step)) for step in range(1, self.steps + 1)]
            for place in self.places
        }
        return {
            "axis": self.axis,
            "values": self.values,
            "slopes": slopes,
            "judged": {place: _finite(self.judged_slope(place)) for place in JUDGED},
            "growing": self.growing,
            "shrinking": self.shrinking,
            "measurements": [m.to_json() for m in self.measurements],
        }


def sweep(
    config: Config,
    axis: Axis,
    values: Sequence[int],
    *,
    steps: int,
    seeds: int,
    batch: Batch,
    progress: Callable[[str, float], None] | None = None,
) -> Sweep:
    """Measure models of several widths or depths.

    Args:
        config: The run; all but the axis is as it says.
        axis: What is varied.
        values: Widths or depths.
        steps: Optimizer steps of each model.
        seeds: Number of initial weights of each.
        batch: What all steps are trained on.
        progress: Called with a name of the work and its completed share.

    Raises:
        ConfigError: No model has such a shape.
        ScalingError: A width is no multiple of the width of the heads that belong together.
    """
    if len(set(values)) < 2:
        raise ScalingError(f"--{axis}s {','.join(map(str, values))}: a slope needs two or more")
    change = with_width if axis == "width" else with_depth
    variants = [
        (change(config, value), seed) for value in sorted(set(values)) for seed in range(seeds)
    ]
    measurements = []
    for number, (variant, seed) in enumerate(variants, 1):
        measurements.append(measure(variant, variant.run.seed + seed, steps, batch))
        if progress is not None:
            progress(f"{axis}s", number / len(variants))
    return Sweep(axis, tuple(measurements))


def default_widths(config: Config) -> list[int]:
    """Widths of 1, 2, 4 and 8 groups of heads."""
    return [group_width(config) * factor for factor in (1, 2, 4, 8)]


def first_batch(config: Config, sequences: int) -> Batch:
    """The first sequences that the run is trained on, as one micro-batch.

    Raises:
        ConfigError: The dataset is not the one that the config describes.
        DataError: The dataset is missing or damaged.
    """
    sections = config.model_dump(mode="json")
    sections["train"] |= {
        "global_batch_size": sequences,
        "micro_batch_size": sequences,
        "batch_schedule": None,
        "batch_growth": None,
    }
    loader = Loader(parse_config(sections, "coordinate check"), 0, 1)
    try:
        return loader.step_batches(0)[0]
    finally:
        loader.close()


def random_batch(config: Config, sequences: int) -> Batch:
    """Sequences of uniformly random tokens, each one document."""
    shape = (sequences, config.data.sequence_length)
    chance = torch.Generator().manual_seed(config.run.seed)
    tokens = torch.randint(config.model.vocab_size, shape, generator=chance)
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = IGNORE_INDEX
    return Batch(
        tokens=tokens,
        targets=targets,
        position_ids=torch.arange(shape[1]).expand(shape).contiguous(),
        document_ids=torch.zeros(shape, dtype=torch.int32),
        token_weights=(targets != IGNORE_INDEX).float(),
        target_bytes=torch.zeros(shape, dtype=torch.int32),
        is_text=targets != IGNORE_INDEX,
        domain_ids=torch.zeros(sequences, dtype=torch.int64),
        sequence_numbers=torch.arange(sequences),
        cu_seqlens=torch.arange(sequences + 1, dtype=torch.int32) * shape[1],
    )


def measure(config: Config, seed: int, steps: int, batch: Batch) -> Measurement:
    """Step one model, fp32, on the device of the batch.

    Args:
        config: Its model and optimizer.
        seed: Of its initial weights.
        steps: Number of steps.
        batch: What all steps are trained on.
    """
    device = batch.tokens.device
    config = config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})
    model = build_decoder(config).to(device)
    optimizer = _optimizer(config, model, device)
    first = _activations(model, batch)
    sizes = {place: [_mean_size([x])] for place, x in first.items()}
    changes = {place: [0.0] for place in first}
    updates: dict[str, list[float]] = {}
    losses = []
    for _ in range(steps):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        losses.append(_step(config, model, optimizer, batch))
        by_component: dict[str, list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            moved = by_component.setdefault(component_of(name), [])
            moved.append(parameter.detach() - before[name])
        for component, moved in by_component.items():
            updates.setdefault(component, []).append(_mean_size(moved))
        for place, x in _activations(model, batch).items():
            sizes[place].append(_mean_size([x]))
            changes[place].append(_mean_size([x - first[place]]))
    with torch.no_grad():
        losses.append(float(_loss(config, model, batch)))
    return Measurement(
        config.model.width, config.model.depth, seed, losses, sizes, changes, updates
    )


def _optimizer(config: Config, model: Decoder, device: torch.device) -> GuardedOptimizer:
    """The run's optimizer on one rank, at the peak learning rate, without decay."""
    spec, parameters = optimizer_spec(config), dict(model.named_parameters())

    def verdict() -> tuple[Tensor, Tensor]:
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        return nn.utils.get_total_norm(gradients), torch.zeros((), dtype=torch.bool, device=device)

    groups = [group | {"weight_decay": 0.0} for group in spec.torch_groups(parameters.items())]
    optimizer = spec.build(groups, verdict)
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    shards = (Shard(name, shapes[name], p, 0, 0, p.numel()) for name, p in parameters.items())
    optimizer.attach(parameters.values(), shards)
    optimizer.connect(shapes, [group["params"] for group in optimizer.param_groups], None)
    for group in optimizer.param_groups:
        group["lr"] = config.optimizer.lr * group["lr_factor"]
    return optimizer


def _step(config: Config, model: Decoder, optimizer: GuardedOptimizer, batch: Batch) -> float:
    """Make one step; returns the loss before it."""
    optimizer.zero_grad()
    loss = _loss(config, model, batch)
    loss.backward()  # type: ignore[no-untyped-call]  # torch
    optimizer.step()
    return float(loss.detach())


def _loss(config: Config, model: Decoder, batch: Batch) -> Tensor:
    z_loss = config.objective.z_loss_coefficient
    return next_token_loss(model, batch, local_weight_sum([batch]), z_loss).loss


def _activations(model: Decoder, batch: Batch) -> dict[str, Tensor]:
    """Place -> activations, in the order of the forward pass."""
    places: list[tuple[str, nn.Module]] = [("embedding", model.embed_tokens)]
    places += [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
    places[-1] = (LAST_BLOCK, places[-1][1])
    places.append(("final_norm", model.final_norm))
    with torch.no_grad(), _outputs_of(places) as outputs:
        documents = PackedDocuments(batch.document_ids, batch.cu_seqlens)
        hidden = model(
            batch.tokens,
            batch.position_ids,
            documents,
            sequence_numbers_B=batch.sequence_numbers,
        ).hidden
        outputs[LOGITS] = model.lm_head(hidden)
    return outputs


@contextmanager
def _outputs_of(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[dict[str, Tensor]]:
    """Name -> output of the module, or the first of several, in a forward pass."""
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _mean_size(tensors: list[Tensor]) -> float:
    """Mean absolute value of all elements."""
    total = sum(float(tensor.abs().sum(dtype=torch.float64)) for tensor in tensors)
    return total / sum(tensor.numel() for tensor in tensors)


def _log(size: float) -> float:
    return math.log(size) if size > 0 else -math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
