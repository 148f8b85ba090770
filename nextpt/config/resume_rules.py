"""Resume rules: which keys of a config a resumed run may change."""

from __future__ import annotations

from nextpt.config.keys import all_keys, flatten
from nextpt.config.schema import Config


def may_change(name: str) -> bool:
    """Whether a resumed run may change a dotted key: it, or a key above it, is declared so.

    None of these keys changes what the model learns from which data, except train.steps,
    train.tokens and train.epochs, which lengthen or shorten the run; data.stages,
    train.batch_schedule and train.batch_growth, whose past the loader compares
    (nextpt/data/loader.py); train.precision, because the state is fp32 in either; and
    objective.mtp_weight, of modules that only training has, which is lowered late in a run.
    """
    changeable = {key.name for key in all_keys() if key.may_change}
    parts = name.split(".")
    return any(".".join(parts[:n]) in changeable for n in range(1, len(parts) + 1))


def differences(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """Keys in which two configs differ.

    Returns:
        Phrases "KEY: OLD -> NEW": those that a resumed run may change, and those it may not.
    """
    before, after = (flatten(config.model_dump(mode="json")) for config in (old, new))
    allowed: list[str] = []
    forbidden: list[str] = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            phrases = allowed if may_change(key) else forbidden
            phrases.append(f"{key}: {before.get(key)} -> {after.get(key)}")
    return allowed, forbidden
