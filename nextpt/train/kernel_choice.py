"""The choice of attention for a run on CUDA: by trials in its own shapes, and remembered.

Rank 0 decides and all ranks take the same. A run that is resumed on devices of the same kind keeps
what it had, so that its losses have the same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import kernels
from kernels.choice import ATTENTION, ATTENTION_ORDER
from kernels.trials import AttentionShape, Trial, function_paths, quickest
from nextpt.config import Config
from nextpt.data.batch import Batch
from nextpt.job.environment import versions
from nextpt.job.kernel_cache import cache_file, entry_key, read_entries, remember
from nextpt.model import ModelSpec
from nextpt.train.kernel_trials import SECONDS, run_trials
from nextpt.train.startup_checks import attention_dtype, attention_features_of

MEASURED = ("cuda",)  # types of devices on which "auto" is measured; elsewhere its order decides
VERSIONS = ("torch", "triton", "flash-attn")


@dataclass(frozen=True)
class KernelChoice:
    """What was chosen, and by what.

    Attributes:
        name: The implementation.
        source: "trials", "cache" (trials of an earlier job on such a device), "run" (what the run
            had before) or "order" (nothing to choose from, or no trial that succeeded).
        trials: What came of every candidate, where trials decided.
    """

    name: str
    source: str
    trials: tuple[Trial, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As environment.json keeps it."""
        return {**asdict(self), "trials": [trial._asdict() for trial in self.trials]}

    def summary(self, device: str) -> str:
        """One line for the log: what was chosen, its time, and what came of the others."""
        words = []
        for trial in self.trials:
            what = trial.reason or f"{trial.milliseconds:.3g} ms"
            words.append(
                f"{trial.name} {what}" if trial.reason is None else f"{trial.name}: {what}"
            )
        measured = f"; attention of a micro-batch: {', '.join(words)}" if words else ""
        return f"attention: {self.name} ({_SOURCES[self.source]} on {device}){measured}"


_SOURCES = {
    "trials": "the quickest that is right, measured",
    "cache": "measured before",
    "run": "as before in this run,",
    "order": "the first that can do it",
}


def candidates(config: Config, device: str) -> list[str]:
    """Implementations that can do what all layers of a run ask, in the order of the device.

    The reference, which writes out all scores, is none of them.
    """
    refusals = refusals_of(config, device)
    return [name for name in ATTENTION_ORDER[device] if name in refusals and not refusals[name]]


def refusals_of(config: Config, device: str) -> dict[str, str | None]:
    """Why each implementation is no candidate; None of those that are.

    Args:
        config: The run.
        device: Type of the torch device.
    """
    refusals: dict[str, str | None] = {}
    for name, implementation in ATTENTION.items():
        reasons: list[str] = []
        for features in attention_features_of(config, device).values():
            reasons += implementation.refusals(device, features)
            if device == "cuda" and (slow := features & implementation.slow_on_cuda):
                reasons.append(f"it writes a mask of all scores for {', '.join(sorted(slow))}")
        if name == "reference":
            reasons.append("it writes out all scores")
        refusals[name] = "; ".join(dict.fromkeys(reasons)) or None
    return refusals


def choose_attention_kernel(
    config: Config,
    device: torch.device,
    device_name: str,
    read_batch: Callable[[], Batch],
    starts: Sequence[dict[str, Any]],
    cache: Path | None = None,
) -> KernelChoice:
    """Choose for a run whose `model.attention` is auto, on a type of device that is measured.

    Args:
        config: The run.
        device: Of this rank.
        device_name: Kind of the device, as environment.json names it.
        read_batch: Reads a micro-batch of the run, from which the lengths of documents are taken.
        starts: Earlier starts of the run, as environment.json has them, oldest first.
        cache: File of earlier trials; that of the user if None.
    """
    names = candidates(config, device.type)
    if kept := _kept(starts, device_name, names):
        return KernelChoice(kept, "run")
    if len(names) < 2:
        return KernelChoice(names[0] if names else "auto", "order")
    batch = read_batch()
    rows, length = batch.tokens.shape
    shape = attention_shape(config, device.type, rows, length, batch.cu_seqlens.tolist())
    cache = cache or cache_file()
    facts = _facts(device_name, names, shape)
    key = entry_key(facts)
    trials = _trials_of(read_entries(cache).get(key), names)
    source = "cache"
    if trials is None:
        source, trials = "trials", try_all(names, shape, str(device))
        remember(cache, key, {**facts, "trials": [trial._asdict() for trial in trials]})
    if (name := quickest(trials)) is None:
        return KernelChoice(names[0], "order", tuple(trials))
    return KernelChoice(name, source, tuple(trials))


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
        dtype=str(attention_dtype(config, device)).removeprefix("torch."),
        windows=tuple((w, spec.windows.count(w)) for w in dict.fromkeys(spec.windows)),
        sinks=spec.attention_sinks,
        documents=tuple(starts),
    )


def _kept(starts: Sequence[dict[str, Any]], device_name: str, names: list[str]) -> str | None:
    """What the newest start that chose on such a device took, if it can still be taken."""
    for start in reversed(starts):
        choice = start.get("attention")
        if isinstance(choice, dict) and [*start["devices"]] == [device_name]:
            name = choice.get("name")
            return name if name in names else None
    return None


def try_all(
    names: Sequence[str], shape: AttentionShape, device: str, seconds: float = SECONDS
) -> list[Trial]:
    """Try implementations by name; see `run_trials`."""
    paths = function_paths()
    return run_trials({name: paths[name] for name in names}, shape, device, seconds)


def describe_shape(shape: AttentionShape) -> dict[str, Any]:
    """As JSON, with the mean length of the documents, to a factor of two, for their starts."""
    documents = len({*shape.documents}) - 1
    mean = shape.rows * shape.length / max(documents, 1)
    return asdict(shape) | {"documents": 2 ** round(math.log2(mean))}


def _facts(device_name: str, names: list[str], shape: AttentionShape) -> dict[str, Any]:
    """What trials depend on."""
    installed = versions()
    return {
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
