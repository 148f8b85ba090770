"""Config: merging, validation, and errors that name the key, the value and the fix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextpt.base.errors import ConfigError
from nextpt.config import (
    Config,
    all_keys,
    describe_keys,
    differences,
    flatten,
    load_config,
    may_change,
    parse_config,
    to_yaml,
)
from nextpt.config.reader import INDEX
from nextpt.config.section import _types


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


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optimizer.lr", True, "optimizer.lr = true: expected a number"),
        ("train.steps", True, "train.steps = true: expected a number"),
        ("train.zero_stage", False, "train.zero_stage = false: expected a number"),
        ("checkpoint.resume", True, "checkpoint.resume = true: expected a number"),
        ("data.mixing.code", True, "data.mixing = "),
        ("train.ema", [0.5, True], "train.ema = "),
        ("optimizer.lr", float("inf"), "optimizer.lr = inf"),
        ("guard.spike_sigma", float("nan"), "guard.spike_sigma = nan"),
        ("objective.domain_weights.code", float("inf"), "objective.domain_weights.code = inf"),
        ("train.steps", 10**30, "train.steps = 1"),
    ],
)
def test_no_truth_value_and_no_infinity_is_a_number(name: str, value: Any, message: str) -> None:
    section, *keys = name.split(".")
    for key in reversed(keys):
        value = {key: value}
    with pytest.raises(ConfigError) as caught:
        config(**{section: value})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_every_number_key_refuses_true_and_infinity() -> None:
    numbers = [
        key
        for key in describe_keys()
        if {int, float} & set(_types(key.field.annotation)) and f".{INDEX}." not in key.name
    ]
    assert len(numbers) >= 39
    for key in numbers:
        for value in (True, float("inf")):
            section, *keys = key.name.split(".")
            nested: Any = value
            for part in reversed(keys):
                nested = {part: nested}
            with pytest.raises(ConfigError, match=re.escape(key.name)):
                config(**{section: nested})


@pytest.mark.parametrize(
    ("text", "steps"), [("010", 10), ("1_0", 10), ("1e1", 10), ("+10", 10), ("'10'", 10)]
)
def test_numbers_are_decimal(tmp_path: Path, text: str, steps: int) -> None:
    path = write(tmp_path, to_yaml(config()))
    assert load_config(path, [f"train.steps={text}"]).train.steps == steps
    path = write(tmp_path, to_yaml(config()).replace("steps: 10\n", f"steps: {text}\n", 1))
    assert load_config(path).train.steps == steps


@pytest.mark.parametrize("text", ["1:30", "0x10", "0o10", "0b1", ".inf", ".nan", "inf", "1e400"])
def test_other_spellings_of_numbers_are_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, to_yaml(config()))
    for key in ("train.steps", "optimizer.lr"):
        with pytest.raises(ConfigError, match=re.escape(key)):
            load_config(path, [f"{key}={text}"])


@pytest.mark.parametrize("text", ["123", "010", "1e3", "true", "1.0", "2026-11-30"])
def test_text_keys_hold_what_is_written(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, to_yaml(config()))
    assert load_config(path, [f"run.name={text}"]).run.name == text
    written = write(tmp_path, to_yaml(config()).replace("name: t\n", f"name: {text}\n"))
    loaded = load_config(written)
    assert loaded.run.name == text
    assert load_config(write(tmp_path, to_yaml(loaded))) == loaded
    paths = load_config(path, ["data.path=/a b: c #d", "run.dir=null", "run.name='x'"])
    assert (paths.data.path, paths.run.dir, paths.run.name) == ("/a b: c #d", None, "x")


def test_names_of_domains_are_text(tmp_path: Path) -> None:
    path = write(tmp_path, to_yaml(config()))
    loaded = load_config(path, ["data.mixing={no: 0.5, 123: 0.5}"])
    assert loaded.data.mixing == {"no": 0.5, "123": 0.5}


def test_a_whole_mapping_replaces_and_single_keys_merge(tmp_path: Path) -> None:
    path = write(tmp_path, to_yaml(config(data={"mixing": {"a": 0.8, "b": 0.2}})))
    for overrides, mixing in (
        (["data.mixing={b: 1.0}"], {"b": 1.0}),
        (["data.mixing.b=1.0"], {"a": 0.8, "b": 1.0}),
        (["data.mixing={}"], {}),
        (["data.mixing=null"], None),
        (["data.mixing={c: 1.0}", "data.mixing.d=2"], {"c": 1.0, "d": 2}),
    ):
        assert load_config(path, overrides).data.mixing == mixing
    loaded = load_config(path, ["schedule={kind: linear}"])
    assert (loaded.schedule.kind, loaded.schedule.final_ratio) == ("linear", 0.0)
    loaded = load_config(path, ["data.repeat_caps={a: 1}"], warn_deprecated=False)
    assert loaded.data.max_epochs == {"a": 1.0}


def test_items_of_lists_are_overridden_by_number(tmp_path: Path) -> None:
    path = write(tmp_path, to_yaml(config(data={"stages": [{"steps": 4}, {}]})))
    for name in ("data.stages.0.steps", "data.stages[0].steps"):
        stages = load_config(path, [f"{name}=5"]).data.stages
        assert stages is not None and [stage.steps for stage in stages] == [5, None]
    with pytest.raises(ConfigError, match=r"data\.stages\.2\.steps=5.*2 items"):
        load_config(path, ["data.stages.2.steps=5"])


@pytest.mark.parametrize("text", ["a: &a {b: *a}", "[" * 100_000, "a: 1\na: 2\n", "a: !x 1"])
def test_malformed_yaml_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml") as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "\ufeff" + to_yaml(config()))) == config()


def test_the_home_folder_in_every_path_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/user")
    path = write(tmp_path, to_yaml(config()))
    names = [key.name for key in all_keys() if key.metadata.is_path]
    assert len(names) == 8
    for name in names:
        more = {
            "train.decay_from.run": ["train.decay_from.at_step=1", "train.steps=null"]
            + ["schedule.kind=wsd", "schedule.decay=2"],
            "trackers.mlflow.uri": ["trackers.mlflow.experiment=x"],
        }.get(name, [])
        loaded = load_config(path, [f"{name}=~/x", *more])
        assert flatten(loaded.model_dump(mode="json"))[name] == "/home/of/user/x"
    with pytest.raises(ConfigError, match="no such home folder"):
        load_config(path, ["run.dir=~nobody-of-that-name/x"])


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
