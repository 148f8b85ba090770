"""The choice of attention and loss for a run on CUDA: by trials in its own shapes, remembered.

Rank 0 decides and all ranks take the same. A run that is resumed on devices of the same kind keeps
what it had, so that its losses have the same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import kernels
from kernels.attention import trial as attention_trial
from kernels.attention.trial import AttentionShape
from kernels.choice import (
    ATTENTION,
    ATTENTION_ORDER,
    CROSS_ENTROPY,
    CROSS_ENTROPY_ORDER,
    Implementation,
)
from kernels.cross_entropy import trial as loss_trial
from kernels.cross_entropy.trial import LossShape
from kernels.trials import Shape, Trial, quickest
from nextpt.config import Config
from nextpt.data.batch import Batch
from nextpt.job.environment import versions
from nextpt.job.kernel_cache import cache_file, entry_key, read_entries, remember
from nextpt.model import ComputeOptions, ModelSpec
from nextpt.train.kernel_trials import SECONDS, run_trials
from nextpt.train.startup_checks import attention_dtype, attention_features_of

MEASURED = ("cuda",)  # types of devices on which "auto" is measured; elsewhere its order decides
OPERATORS = ("attention", "cross_entropy")  # keys of the section `model`
VERSIONS = ("torch", "triton", "flash-attn")
_SOURCES = {
    "trials": "the quickest that is right, measured",
    "cache": "the quickest that is right, measured before",
    "run": "as before in this run,",
    "order": "the first that can do it",
}


@dataclass(frozen=True)
class KernelChoice:
    """What was chosen for an operator, and by what.

    Attributes:
        operator: "attention" or "cross_entropy".
        name: The implementation.
        source: "trials", "cache" (trials of an earlier job on such a device), "run" (what the run
            had before) or "order" (nothing to choose from, or no trial that succeeded).
        trials: What came of every candidate, where trials decided.
    """

    operator: str
    name: str
    source: str
    trials: tuple[Trial, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As environment.json keeps it."""
        trials = [trial._asdict() for trial in self.trials]
        return {"name": self.name, "source": self.source, "trials": trials}

    def summary(self, device: str) -> str:
        """One line for the log: what was chosen, its time, and what came of the others."""
        words = [
            f"{t.name} {t.milliseconds:.3g} ms" if t.reason is None else f"{t.name}: {t.reason}"
            for t in self.trials
        ]
        measured = f"; of a micro-batch: {', '.join(words)}" if words else ""
        return f"{self.operator}: {self.name} ({_SOURCES[self.source]} on {device}){measured}"


def refusals_of(config: Config, operator: str, device: str) -> dict[str, str | None]:
    """Why each implementation is no candidate; None of those that are.

    Args:
        config: The run.
        operator: "attention" or "cross_entropy".
        device: Type of the torch device.
    """
    if operator == "attention":
        table, needed = ATTENTION, [*attention_features_of(config, device).values()]
    else:
        table, needed = CROSS_ENTROPY, [set()]
    return {name: _refusal(candidate, needed, device) for name, candidate in table.items()}


def _refusal(candidate: Implementation, needed: list[set[str]], device: str) -> str | None:
    reasons: list[str] = []
    for features in needed:
        reasons += candidate.refusals(device, features)
        if device == "cuda" and (slow := features & candidate.slow_on_cuda):
            reasons.append(f"it writes a mask of all scores for {', '.join(sorted(slow))}")
    if candidate.name == "reference":
        reasons.append("it writes out all scores")
    return "; ".join(dict.fromkeys(reasons)) or None


def candidates(config: Config, operator: str, device: str) -> list[str]:
    """Implementations that can do what a run asks, in the order of the device."""
    orders: Mapping[str, Sequence[str]] = (
        ATTENTION_ORDER if operator == "attention" else CROSS_ENTROPY_ORDER
    )
    refusals = refusals_of(config, operator, device)
    return [name for name in orders[device] if not refusals[name]]


def choose_kernels(
    config: Config,
    device: torch.device,
    device_name: str,
    read_batch: Callable[[], Batch],
    starts: Sequence[dict[str, Any]],
    cache: Path | None = None,
) -> list[KernelChoice]:
    """Choose for every operator that the config leaves open, on a device that is measured.

    Args:
        config: The run.
        device: Of this rank.
        device_name: Kind of the device, as environment.json names it.
        read_batch: Reads a micro-batch of the run, from which the lengths of documents are taken.
        starts: Earlier starts of the run, as environment.json has them, oldest first.
        cache: File of earlier trials; that of the user if None.
    """
    if device.type not in MEASURED:
        return []

    def shape(operator: str) -> Shape:
        if operator == "cross_entropy":
            return loss_shape(config, device.type)
        batch = read_batch()
        rows, length = batch.tokens.shape
        return attention_shape(config, device.type, rows, length, batch.cu_seqlens.tolist())

    choices = []
    for operator in OPERATORS:
        if getattr(config.model, operator) != "auto":
            continue
        names = candidates(config, operator, device.type)
        if kept := _kept(starts, operator, device_name, names):
            choices.append(KernelChoice(operator, kept, "run"))
        elif len(names) < 2:
            choices.append(KernelChoice(operator, names[0] if names else "auto", "order"))
        else:
            tried = shape(operator), str(device), device_name, cache or cache_file()
            choices.append(_choose(operator, names, *tried))
    return choices


def _choose(
    operator: str, names: list[str], shape: Shape, device: str, device_name: str, cache: Path
) -> KernelChoice:
    """Choose by the trials that are remembered, or by new ones."""
    facts = _facts(operator, device_name, names, shape)
    key = entry_key(facts)
    trials, source = _trials_of(read_entries(cache).get(key), names), "cache"
    if trials is None:
        trials, source = try_all(operator, names, shape, device), "trials"
        if quickest(trials):  # where all fail the device was busy, say: the next job tries again
            remember(cache, key, {**facts, "trials": [trial._asdict() for trial in trials]})
    if (name := quickest(trials)) is None:
        name, source = names[0], "order"
    return KernelChoice(operator, name, source, tuple(trials))


def try_all(
    operator: str, names: Sequence[str], shape: Shape, device: str, seconds: float = SECONDS
) -> list[Trial]:
    """Try implementations of an operator by name; see `run_trials`."""
    module = attention_trial if operator == "attention" else loss_trial
    paths = module.function_paths()
    return run_trials({name: paths[name] for name in names}, shape, device, seconds)


def attention_shape(
    config: Config, device: str, rows: int, length: int, starts: Sequence[int]
) -> AttentionShape:
    """What the attention of a run's micro-batches has to compute.

    Args:
        config: The run.
        device: Type of the torch device.
        rows: Sequences.
        length: Tokens of each.
        starts: Starts of the documents in the flattened rows, then their total.
    """
    spec = ModelSpec.from_config(config)
    return AttentionShape(
        rows=rows,
        length=length,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=_name(attention_dtype(config, device)),
        windows=tuple((w, spec.windows.count(w)) for w in dict.fromkeys(spec.windows)),
        sinks=spec.attention_sinks,
        documents=tuple(starts),
    )


def loss_shape(config: Config, device: str) -> LossShape:
    """What the loss of a run's micro-batches has to compute on a type of device."""
    options = ComputeOptions.from_config(config)
    return LossShape(
        tokens=config.train.micro_batch_size * config.data.sequence_length,
        width=config.model.width,
        vocab_size=config.model.vocab_size,
        dtype=_name(attention_dtype(config, device)),
        gradient=options.loss_gradient,
        logits_fp32=options.loss_logits_dtype is not None,
        workspace_bytes=options.loss_workspace_bytes,
        softcap=config.model.logit_softcap,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe_shape(shape: Any) -> dict[str, Any]:
    """As JSON; of documents the mean length, to a factor of two, in the place of their starts."""
    values = asdict(shape)
    if isinstance(shape, AttentionShape):
        documents = len({*shape.documents}) - 1
        mean = shape.rows * shape.length / max(documents, 1)
        values["documents"] = 2 ** round(math.log2(mean))
    return values


def _kept(
    starts: Sequence[dict[str, Any]], operator: str, device_name: str, names: list[str]
) -> str | None:
    """What the newest start that chose on such a device took, if it can still be taken."""
    for start in reversed(starts):
        chosen = start.get("kernels")
        if isinstance(chosen, dict) and [*start["devices"]] == [device_name]:
            choice = chosen.get(operator)
            name = choice.get("name") if isinstance(choice, dict) else None
            return name if name in names else None
    return None


def _facts(operator: str, device_name: str, names: list[str], shape: Shape) -> dict[str, Any]:
    """What trials depend on."""
    installed = versions()
    return {
        "operator": operator,
        "device": device_name,
        "driver": _driver(),
        "versions": {name: installed.get(name) for name in VERSIONS},
        "source": _source(),
        "candidates": names,
        "shape": describe_shape(shape),
    }


def _driver() -> str | None:
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return None


def _source() -> str:
    """Hash of our own kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(kernels.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _trials_of(entry: Any, names: list[str]) -> list[Trial] | None:
    """Trials of an entry of the cache, which anyone may have written; None where it is damaged."""
    try:
        trials = [Trial(**trial) for trial in entry["trials"]]
        quickest(trials)
    except (TypeError, KeyError):
        return None
    return trials if [trial.name for trial in trials] == names else None
