"""The choice of attention by trials: decisions, memory, and candidates that err."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.attention import trial as attention_trial
from kernels.attention.trial import AttentionShape
from kernels.cross_entropy import LossOutput, linear_cross_entropy
from kernels.cross_entropy import trial as loss_trial
from kernels.cross_entropy.trial import LossShape
from kernels.trials import Shape, Trial, quickest
from nextpt.config import Config, to_yaml
from nextpt.data.batch import Batch
from nextpt.data.loader import Loader
from nextpt.job.environment import read_starts
from nextpt.job.kernel_cache import KEPT_ENTRIES
from nextpt.train import kernel_choice
from nextpt.train.kernel_choice import KernelChoice, choose_kernels
from nextpt.train.kernel_trials import run_trials
from tests.support import fake_attention
from tests.support.datasets import tiny
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
# Two rows of 40, of which the first has two documents and the second three
SHAPE = AttentionShape(
    2, 40, 4, 2, 8, "float32", ((None, 2), (7, 1)), True, (0, 15, 40, 50, 53, 80, 80), 0.0
)


@pytest.fixture
def config(dataset: Path, tmp_path: Path) -> Config:
    return tiny(dataset, tmp_path / "run", model={"cross_entropy": "torch"})


class Trials:
    """Stands in for trials in a child process and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *trials: Trial) -> None:
        self.count, self.trials = 0, list(trials)
        monkeypatch.setattr(kernel_choice, "try_all", self.run)
        names = [trial.name for trial in trials]
        monkeypatch.setattr(kernel_choice, "MEASURED", ("cpu",))
        monkeypatch.setattr(kernel_choice, "candidates", lambda config, operator, device: names)

    def run(self, operator: str, names: list[str], shape: Shape, device: str) -> list[Trial]:
        assert operator == "attention" and names == [trial.name for trial in self.trials]
        self.count += 1
        return self.trials


def choose(
    config: Config, cache: Path, device: str = "H200", starts: tuple[dict[str, Any], ...] = ()
) -> KernelChoice:
    loader = Loader(config, 0, 1)
    try:
        (choice,) = choose_kernels(
            config, CPU, device, lambda: loader.step_batches(0)[0], starts, cache
        )
        return choice
    finally:
        loader.close()


def start(choice: KernelChoice, *devices: str) -> dict[str, Any]:
    return {"devices": dict.fromkeys(devices, 1), "kernels": {"attention": choice.to_json()}}


def test_the_quickest_that_is_right_wins(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = Trials(
        monkeypatch,
        Trial("varlen", 3.0, 0.001),
        Trial("flex", 2.5, 0.001),
        Trial("triton", 1.0, 0.2, "its results are off by 0.2"),
        Trial("sdpa", reason="it fails: RuntimeError: no kernel"),
    )
    choice = choose(config, tmp_path / "cache.json")
    assert (choice.name, choice.source, trials.count) == ("flex", "trials", 1)
    assert choice.summary("H200") == (
        "attention: flex (the quickest that is right, measured on H200); of a"
        " micro-batch: varlen 3 ms, flex 2.5 ms, triton: its results are off by 0.2, sdpa: it"
        " fails: RuntimeError: no kernel"
    )


def test_trials_are_remembered_by_device_and_shape(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "folder" / "cache.json"
    trials = Trials(monkeypatch, Trial("varlen", 3.0, 0.0), Trial("flex", 2.0, 0.0))
    assert choose(config, cache).source == "trials"
    assert choose(config, cache) == KernelChoice("attention", "flex", "cache", tuple(trials.trials))
    assert trials.count == 1
    assert choose(config, cache, "H100").source == "trials"
    other = config.model_copy(
        update={"train": config.train.model_copy(update={"micro_batch_size": 4})}
    )
    assert choose(other, cache).source == "trials"
    assert trials.count == 3
    assert choose(config, cache).source == "cache"


@pytest.mark.parametrize(
    "content",
    ["", "[]", "[" * 100000, "{", '{"KEY": 3}', '{"KEY": {"trials": [{"name": 1}]}}',
     '{"KEY": {"trials": [{"name": "flex", "milliseconds": "1"}]}}',
     '{"KEY": {"time": "x", "trials": [{"nam": "flex"}]}}'],
)  # fmt: skip
def test_a_damaged_memory_is_no_memory(
    content: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache.json"
    trials = Trials(monkeypatch, Trial("varlen", 3.0, 0.0), Trial("flex", 2.0, 0.0))
    choose(config, cache)
    (key,) = json.loads(cache.read_text())
    cache.write_text(content.replace("KEY", key))
    choice = choose(config, cache)
    assert (choice.name, choice.source, trials.count) == ("flex", "trials", 2)
    assert choose(config, cache).source == "cache"


def test_the_memory_is_bounded_and_may_be_refused(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = tmp_path / "cache.json"
    old = {f"key-{n}": {"time": float(n), "trials": []} for n in range(KEPT_ENTRIES)}
    cache.write_text(json.dumps(old))
    Trials(monkeypatch, Trial("varlen", 3.0, 0.0), Trial("flex", 2.0, 0.0))
    choose(config, cache)
    kept = json.loads(cache.read_text())
    assert len(kept) == KEPT_ENTRIES and "key-0" not in kept and "key-1" in kept
    refused = tmp_path / "file" / "cache.json"
    refused.parent.write_text("")
    assert choose(config, refused).name == "flex"
    assert "trials of kernels are not kept" in capsys.readouterr().err


def test_without_one_that_is_right_the_order_decides(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Trials(
        monkeypatch, Trial("varlen", reason="it fails"), Trial("flex", reason="it fails")
    )
    choose(config, tmp_path / "cache.json")
    choice = choose(config, tmp_path / "cache.json")
    assert failing.count == 2  # failures of all are not remembered
    assert (choice.name, choice.source) == ("varlen", "order")
    assert "varlen: it fails" in choice.summary("H200")
    trials = Trials(monkeypatch, Trial("varlen"))
    assert choose(config, tmp_path / "cache.json") == KernelChoice("attention", "varlen", "order")
    assert trials.count == 0
    Trials(monkeypatch)
    assert choose(config, tmp_path / "cache.json") == KernelChoice("attention", "auto", "order")


def test_a_resumed_run_keeps_its_attention(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache.json"
    trials = Trials(monkeypatch, Trial("varlen", 3.0, 0.0), Trial("flex", 2.0, 0.0))
    before = start(KernelChoice("attention", "varlen", "trials"), "H200")
    assert choose(config, cache, starts=(before,)) == KernelChoice("attention", "varlen", "run")
    assert choose(config, cache, "H100", (before,)).name == "flex"
    later = start(KernelChoice("attention", "flex", "trials"), "H100")
    assert choose(config, cache, "H200", (before, later)) == KernelChoice(
        "attention", "varlen", "run"
    )
    assert trials.count == 1
    # Nothing was chosen, several kinds of device, an implementation that is not there now
    for other in (
        {"devices": {"H200": 8}},
        start(KernelChoice("attention", "varlen", "trials"), "H200", "H100"),
        start(KernelChoice("attention", "flash_attn", "trials"), "H200"),
        {"devices": {"H200": 1}, "kernels": {"attention": {"name": ["varlen"]}}},
        {"devices": {"H200": 1}, "kernels": {"attention": "varlen"}},
        {"devices": {"H200": 1}, "kernels": {}},
    ):
        assert choose(config, cache, "H200", (other,)).name == "flex"


def test_fakes_are_judged() -> None:
    def of(name: str) -> Trial:
        return SHAPE.try_candidate(name, getattr(fake_attention, name), CPU)

    right, slow = of("right"), of("slow")
    assert right.reason is None and right.error == 0.0 and right.milliseconds is not None
    # Three layers of 0.2 s
    assert slow.reason is None and slow.milliseconds is not None and slow.milliseconds > 600
    assert "off by" in str(of("without_documents").reason)
    assert of("nan_in_gradients") == Trial(
        "nan_in_gradients", None, None, "its results are off by nan"
    )
    assert of("raising").reason == (
        "it fails: RuntimeError: CUDA error: an illegal memory access was encountered"
    )
    assert quickest([slow, right, of("without_documents")]) == "right"
    assert quickest([of("raising")]) is None


def test_real_implementations_are_tried_by_their_path() -> None:
    paths = attention_trial.function_paths()
    assert paths["varlen"] == "kernels.attention.flash:run_torch"
    plain = replace(SHAPE, sinks=False)
    documents = plain.packed(CPU)
    assert documents.document_ids[0].diff().nonzero().flatten().tolist() == [14]
    assert documents.document_ids[1].diff().nonzero().flatten().tolist() == [9, 12]


def test_losses_are_judged() -> None:
    """In the interpreter, and one whose gradients are wrong."""
    shape = LossShape(20, 16, 50, "float32", softcap=5.0, seconds=0.0)
    assert loss_trial.function_paths()["triton"] == "kernels.cross_entropy.trial:by_triton"
    for function in (loss_trial.by_torch, loss_trial.by_triton):
        trial = shape.try_candidate("name", function, CPU)
        assert trial.reason is None and trial.error is not None and trial.error < 1e-5
        assert trial.milliseconds is not None and trial.milliseconds > 0

    def wrong(hidden: torch.Tensor, *arguments: Any, **options: Any) -> LossOutput:
        output = linear_cross_entropy(hidden, *arguments, **options)
        return output._replace(loss=output.loss + 0.01 * hidden.sum())

    assert "off by" in str(shape.try_candidate("wrong", wrong, CPU).reason)


def test_operators_that_the_config_names_are_not_tried(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread() -> Batch:
        raise AssertionError

    assert choose_kernels(config, CPU, "EPYC", unread, ()) == []  # not measured on a CPU
    monkeypatch.setattr(kernel_choice, "MEASURED", ("cpu",))
    sdpa = {"attention": "sdpa"}
    named = config.model_copy(update={"model": config.model.model_copy(update=sdpa)})
    assert choose_kernels(named, CPU, "EPYC", unread, ()) == []


@pytest.mark.slow
def test_what_crashes_or_hangs_takes_nothing_with_it() -> None:
    names = ("right", "raising", "crashing", "slow", "hanging", "without_documents")
    paths = {name: f"tests.support.fake_attention:{name}" for name in names}
    trials = {t.name: t for t in run_trials(paths, SHAPE, "cpu", seconds=40.0)}
    assert [*trials] == ["right", "raising", "crashing", "slow", "hanging", "without_documents"]
    assert trials["right"].reason is None and trials["slow"].reason is None
    assert trials["crashing"].reason == "its process ended with SIGSEGV"
    assert trials["hanging"].reason == "it takes longer than 40 s"
    assert "illegal memory" in str(trials["raising"].reason)
    assert "off by" in str(trials["without_documents"].reason)


@pytest.mark.slow
@pytest.mark.process
def test_all_ranks_train_with_what_rank_0_chose(dataset: Path, tmp_path: Path) -> None:
    """A start, a resumed one, one on another device, and another run, which remembers."""
    jobs = []
    for number, (run, stop, device) in enumerate(
        [("a", 2, "H200"), ("a", 4, "H200"), ("a", 6, "H100"), ("b", 2, "H200")]
    ):
        path = tmp_path / f"{number}.yaml"
        path.write_text(to_yaml(tiny(dataset, tmp_path / run, train={"stop_at": stop})))
        jobs += [device, str(path)]
    arguments = ["-m", "tests.support.kernel_choice_probe", str(tmp_path / "cache"), *jobs]
    run_ranks(arguments, 2, tmp_path / "logs")
    choices = [start["kernels"]["attention"] for start in read_starts(tmp_path / "a")]
    assert [choice["name"] for choice in choices] == ["reference"] * 3
    assert [choice["source"] for choice in choices] == ["trials", "run", "trials"]
    assert choices[0]["trials"][0]["reason"] == "its process ended with SIGSEGV"
    (other,) = read_starts(tmp_path / "b")
    assert other["kernels"]["attention"]["source"] == "cache"
    assert other["kernels"]["cross_entropy"] == {"name": "torch", "source": "order", "trials": []}
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "attention: reference (the quickest that is right, measured on H200)" in log
    assert "attention: " not in (tmp_path / "logs" / "rank-1.log").read_text()
