"""Config: merging, validation, and errors that name the key, the value and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextpt.base.errors import ConfigError
from nextpt.config import (
    Config,
    all_keys,
    differences,
    load_config,
    may_change,
    parse_config,
    to_yaml,
)


def values(**sections: dict) -> dict:
    """A small valid config, with changes."""
    base = {
        "run": {"name": "t"},
        "data": {"path": "data", "sequence_length": 32},
        "model": {"vocab_size": 64, "depth": 2, "width": 16, "heads": 2},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2},
    }
    return {key: base.get(key, {}) | sections.get(key, {}) for key in base.keys() | sections.keys()}


def config(**sections: dict) -> Config:
    return parse_config(values(**sections), "test")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_overrides_reach_nested_keys(tmp_path: Path) -> None:
    path = write(tmp_path, to_yaml(config()))
    loaded = load_config(
        path, ["train.steps=50", "model.depth=4", "objective.domain_weights.code=2.5"]
    )
    assert (loaded.train.steps, loaded.model.depth) == (50, 4)
    assert loaded.objective.domain_weights == {"code": 2.5}


def test_yaml_round_trip(tmp_path: Path) -> None:
    original = config(checkpoint={"every_steps": 5, "resume": 3})
    assert load_config(write(tmp_path, to_yaml(original))) == original


@pytest.mark.parametrize(
    ("section", "change", "parts"),
    [
        ("train", {"step": 5}, ["unknown key train.step", "train.steps"]),
        ("model", {"dept": 5}, ["unknown key model.dept", "model.depth"]),
        ("optimizer", {"lr": -1}, ["optimizer.lr", "-1", "greater than 0"]),
        ("model", {"vocab_size": 2**33}, ["model.vocab_size", str(2**33)]),
        ("model", {"width": 17}, ["model.width = 17", "model.heads = 2"]),
        ("train", {"zero_stage": 4}, ["train.zero_stage", "4"]),
        ("train", {"zero_stage": 0, "precision": "bf16"}, ["train.zero_stage=1"]),
        ("train", {"tokens": 100}, ["train.steps", "train.tokens"]),
        ("model", {"max_position": 16}, ["data.sequence_length = 32", "model.max_position = 16"]),
        ("schedule", {"warmup": 11}, ["schedule.warmup = 11", "10"]),
        ("validation", {"averages": True}, ["validation.averages = true", "train.ema"]),
        ("objective", {"domain_weights": {"code": -1.0}}, ["objective.domain_weights.code", "-1"]),
    ],
)
def test_errors_name_key_value_and_fix(section: str, change: dict, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**{section: change})
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("text", ["run: [", "- a\n- b\n", "run: {name: t}\nrun2: {}\n"])
def test_broken_files_are_one_line_errors(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value) and "run.yaml" in str(caught.value)


def test_missing_file_and_bad_override(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"train\.steps"):
        load_config(write(tmp_path, to_yaml(config())), ["train.steps"])


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 64))
def test_accumulation_divides_the_batch_or_is_refused(ranks: int, micro: int, batch: int) -> None:
    if batch % micro:
        with pytest.raises(ConfigError, match="global_batch_size"):
            config(train={"global_batch_size": batch, "micro_batch_size": micro})
        return
    run = config(train={"global_batch_size": batch, "micro_batch_size": micro})
    if batch % (micro * ranks):
        with pytest.raises(ConfigError, match="number of ranks"):
            run.accumulation_steps(ranks)
    else:
        assert run.accumulation_steps(ranks) * micro * ranks == batch


def test_differences_show_what_a_resumed_run_may_change() -> None:
    allowed, forbidden = differences(
        config(), config(train={"steps": 20, "zero_stage": 2}, model={"depth": 3})
    )
    assert allowed == ["train.steps: 10 -> 20", "train.zero_stage: 1 -> 2"]
    assert forbidden == ["model.depth: 2 -> 3"]


def test_tokens_are_rounded_up_to_steps() -> None:
    assert config(train={"steps": None, "tokens": 8 * 32 * 3 + 1}).total_steps == 4


def test_every_key_has_a_description() -> None:
    for key in all_keys():
        assert key.field.description, key.name
        assert len(key.field.description) < 200, key.name


def test_metadata_decides_what_a_resumed_run_may_change() -> None:
    changeable = {key.name for key in all_keys() if key.may_change and "." not in key.name}
    assert changeable == {"checkpoint", "guard", "validation", "trackers"}
    for key in ("data.path", "data.max_epochs.code", "train.loss_workspace_mib", "guard.window"):
        assert may_change(key)
    for key in ("data.mixing.code", "run.seed", "run", "data", "model.depth", "train.init_from"):
        assert not may_change(key)


def test_bounds_are_shown_as_they_are_checked() -> None:
    bounds = {key.name: key.bound for key in all_keys()}
    assert bounds["data.prefetch_threads"] == ">= 1 and <= 64"
    assert bounds["train.zero_stage"] == "one of 0, 1, 2, 3"
    assert bounds["optimizer.lr"] == "> 0"
    assert bounds["data.path"] is None
    assert bounds["checkpoint.resume"] == "one of auto, never, or a step"
