"""Tasks: right answers by construction, exact match as greedy decoding, the smooth metrics."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from nextpt.base.errors import DataError
from nextpt.evaluate.loaded_model import LoadedModel, open_model
from nextpt.evaluate.memorization.extraction import greedy
from nextpt.evaluate.tasks.harness import _with_intervals, adapter, run_harness
from nextpt.evaluate.tasks.items import COPIED, PAIRS, TASKS, WORDS, Item, Material, make_items
from nextpt.evaluate.tasks.measure import heldout_loss, measure_tasks, score_items
from nextpt.model import DecoderOutput
from nextpt.observe.tasks_plot import plot_tasks
from tests.support.models import our_logits
from tests.support.runs import make_run

TEXTS = {
    "verse": [
        "Whan that Aprille with his shoures soote the droghte of March hath perced to the roote\n"
        * n
        for n in (4, 9)
    ]
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("tasks") / "run"
    make_run(folder, max_position=512)
    return open_model(folder)


@pytest.fixture(scope="module")
def material(source: LoadedModel) -> Material:
    return Material(source.tokenizer, TEXTS["verse"], 10_000)


def spelled(material: Material, item: Item) -> tuple[str, str]:
    assert item.prompt[0] == material.tokenizer.start_id
    return material.tokenizer.decode(item.prompt[1:]), material.tokenizer.decode(item.answer)


@pytest.mark.thorough
@pytest.mark.parametrize("name", TASKS)
def test_items_are_a_function_of_the_seed_and_differ(material: Material, name: str) -> None:
    items = make_items(name, material, 20, seed=1)
    assert len(items) == 20 and items == make_items(name, material, 20, seed=1) != make_items(
        name, material, 20, seed=2
    )
    assert len({tuple(item.prompt) for item in items}) > 10
    assert make_items(name, material, 5, seed=1) == items[:5]


def test_arithmetic_answers_are_right(material: Material) -> None:
    for item in make_items("arithmetic", material, 30, 0):
        prompt, answer = spelled(material, item)
        sums = re.findall(r"(\d\d) \+ (\d\d) = (\d+)\n", prompt + answer + "\n")
        assert (
            len(sums) == 5
            and all(int(a) + int(b) == int(c) for a, b, c in sums)
            and answer.startswith(" ")
        )


def test_copying_answers_are_right(material: Material) -> None:
    for item in make_items("copying", material, 30, 0):
        lines = "".join(spelled(material, item)).split("\n")
        assert len(lines) == 3 and all(
            left == right and len(left.split()) == COPIED
            for left, right in (line.split(" | ") for line in lines)
        )
        assert set(lines[-1].replace("| ", "").split()) <= set(WORDS)


def test_brackets_close_what_is_open_and_no_less(material: Material) -> None:
    for item in make_items("brackets", material, 50, 0):
        prompt, answer = spelled(material, item)
        *examples, question = prompt.split("\n")
        for line in (*examples, question + answer):
            waiting: list[str] = []
            for bracket in line.split():
                if bracket in PAIRS:
                    waiting.append(PAIRS[bracket])
                else:
                    assert waiting.pop() == bracket
            assert not waiting
        assert len(answer.split()) >= 2 and item.chance == pytest.approx(
            3.0 ** -len(answer.split())
        )


def test_induction_asks_for_what_came_after(material: Material) -> None:
    for item in make_items("induction", material, 30, 0):
        sequence, repetition = item.prompt[1:25], item.prompt[25:]
        assert (
            len(set(sequence)) == 24
            and repetition == sequence[: len(repetition)]
            and repetition
            and item.answer == [sequence[len(repetition)]]
        )
        assert (material.tokenizer.token_bytes()[sequence] > 0).all()


def test_cloze_is_a_word_of_the_text_where_it_stands(material: Material) -> None:
    for item in make_items("cloze", material, 30, 0):
        prompt, answer = spelled(material, item)
        assert re.fullmatch(r" \w{4,}", answer) and any(
            (prompt + answer) in text for text in TEXTS["verse"]
        )
    short = Material(material.tokenizer, TEXTS["verse"], 300)
    assert all(
        len(item.prompt) + len(item.answer) <= 300 for item in make_items("cloze", short, 30, 0)
    )


def test_exact_is_what_greedy_decoding_writes(source: LoadedModel) -> None:
    """Answers that the model itself wrote are right; with one token changed they are wrong."""
    prompts = torch.from_numpy(np.random.default_rng(0).integers(10, 200, (8, 20)))
    answers = greedy(source.decoder, prompts, 4)
    items = [Item(p, a) for p, a in zip(prompts.tolist(), answers.tolist(), strict=True)]
    changed = [
        Item(item.prompt, [*item.answer[:at], item.answer[at] + 1, *item.answer[at + 1 :]])
        for at, item in enumerate(items[:4])
    ]
    nats, hits = score_items(source, [*items, *changed], batch_size=5)
    assert all(h.all() for h in hits[:8])
    for at, h in enumerate(hits[8:]):
        assert h[:at].all() and not h[at]
    logits = our_logits(source.model, torch.tensor([items[0].prompt + items[0].answer]))[
        0
    ].log_softmax(-1)
    assert nats[0] == pytest.approx(
        [-float(logits[19 + k, token]) for k, token in enumerate(items[0].answer)], abs=1e-5
    )
    alone, _ = score_items(source, items[2:3], batch_size=1)
    assert nats[2] == pytest.approx(alone[0], abs=1e-5)


class Copier(torch.nn.Module):
    """Predicts, with probability above 0.9, what followed the current token's last occurrence."""

    def __init__(self, vocab_size: int, max_position: int) -> None:
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(1))
        self.vocab_size, self.max_position = vocab_size, max_position

    def forward(self, tokens: Tensor, positions: Tensor) -> DecoderOutput:
        logits = torch.zeros(*tokens.shape, self.vocab_size)
        for row, text in enumerate(tokens.tolist()):
            for at in range(len(text)):
                before = [i for i in range(at) if text[i] == text[at]]
                if before:
                    logits[row, at, text[before[-1] + 1]] = 12.0
        return DecoderOutput(logits, {})

    def lm_head(self, hidden: Tensor) -> Tensor:
        return hidden


def test_a_model_that_copies_solves_induction(source: LoadedModel) -> None:
    copier = LoadedModel(
        source.path, Copier(source.model.vocab_size, source.model.max_position), source.tokenizer, 3
    )
    scores = measure_tasks(copier, TEXTS, ["induction", "arithmetic"], items=20, resamples=50)
    induction = scores["induction"]
    assert (
        induction["exact"]["value"] == 1
        and induction["exact"]["interval"][1] == 1
        and 0.8 < induction["exact"]["interval"][0] < 1
    )
    per_answer = math.log1p((source.model.vocab_size - 1) * math.exp(-12))
    assert induction["nats_per_token"]["value"] == pytest.approx(per_answer, rel=1e-3)
    assert (
        induction["probability"]["value"] == pytest.approx(math.exp(-per_answer), rel=1e-3)
        and induction["token_accuracy"]["value"] == 1
    )
    assert scores["arithmetic"]["exact"]["value"] < 0.5 and scores["arithmetic"][
        "chance"
    ] == pytest.approx(1 / 179)


def test_heldout_loss_is_that_of_the_first_documents(
    source: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = heldout_loss(source, TEXTS, batch_size=4)
    monkeypatch.setattr("nextpt.evaluate.tasks.measure.LOSS_TOKENS", 50)
    assert heldout_loss(source, TEXTS, batch_size=4)["tokens"] == 50 < whole["tokens"]


def test_user_errors_are_named(source: LoadedModel, material: Material) -> None:
    with pytest.raises(
        DataError,
        match="there is no task 'chess'; there are arithmetic, copying, brackets, induction, cloze",
    ):
        make_items("chess", material, 3, 0)
    with pytest.raises(DataError, match="no item of task copying fits the model's 8 positions"):
        make_items("copying", Material(source.tokenizer, [], 8), 3, 0)
    with pytest.raises(
        DataError, match="or the texts have no word for it; choose others with --task"
    ):
        make_items("cloze", Material(source.tokenizer, ["a b c"], 99), 3, 0)


def test_a_missing_harness_is_named(source: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install .nextpt.harness"):
        run_harness(source, ["lambada_openai"])


@pytest.mark.thorough
def test_errors_of_the_harness_become_intervals_and_draw(tmp_path: Path) -> None:
    scores = _with_intervals(
        {
            "alias": "rhymes",
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "bits,none": 2.0,
            "bits_stderr,none": "N/A",
        }
    )
    assert scores["acc,none"]["interval"] == pytest.approx([0.304, 0.696], abs=1e-3) and scores[
        "bits,none"
    ] == {"value": 2.0, "interval": None}
    assert set(scores) == {"acc,none", "bits,none"}
    at = {
        "run": "runs/x",
        "step": 3,
        "loss": {"bpb": 2.0},
        "tasks": {},
        "harness": {"rhymes": scores},
    }
    for number, checkpoints in enumerate(([at], [at, at | {"step": 5, "loss": {"bpb": 1.9}}])):
        plot_tasks(checkpoints, tmp_path / f"{number}.svg")
        assert "metric of lm-evaluation-harness" in (tmp_path / f"{number}.svg").read_text()


YAML = """task: rhymes
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
def test_the_harness_runs_a_task_of_a_folder(source: LoadedModel, tmp_path: Path) -> None:
    """Its accuracy is what our scores of the same choices say.

    log-likelihoods of whole texts are ours; what it generates is greedy.
    """
    pytest.importorskip("lm_eval")
    questions = [("Whan that Aprille", [" soote", " roote", " March"], i % 3) for i in range(3)] + [
        ("droghte of", [" a b", " perced to"], 0)
    ]
    rows = [
        f'{{"question": "{q}", "choices": {str(c).replace(chr(39), chr(34))}, "gold": {g}}}'
        for q, c, g in questions
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "rhymes.yaml").write_text(YAML.format(data=tmp_path / "data.jsonl"))
    scores = run_harness(source, ["rhymes"], tmp_path)["rhymes"]
    right = 0
    for question, choices, gold in questions:
        items = [
            Material(source.tokenizer, [], 10_000).item(question, f" {choice.strip()}", None)
            for choice in choices
        ]
        right += int(np.argmin([n.sum() for n in score_items(source, items)[0]])) == gold
    assert scores["acc,none"]["value"] == pytest.approx(right / 4)
    low, high = scores["acc,none"]["interval"]
    assert low <= right / 4 <= high
    with pytest.raises(DataError, match="has no task nonesuch"):
        run_harness(source, ["nonesuch"], tmp_path)


@pytest.mark.slow
def test_the_adapter_scores_and_generates(source: LoadedModel) -> None:
    pytest.importorskip("lm_eval")
    live, text = adapter(source, 4), TEXTS["verse"][0]
    [(whole, _)] = live.loglikelihood([SimpleNamespace(args=("", text[:60]))])
    [rolling] = live.loglikelihood_rolling([SimpleNamespace(args=(text[:60],))])
    assert whole == pytest.approx(rolling, rel=1e-6)
    prompt = [source.tokenizer.start_id, *source.tokenizer.encode(text[:30]).tolist()]
    expected = source.tokenizer.decode(
        greedy(source.decoder, torch.tensor([prompt]), 6)[0].tolist()
    )
    continuations = live.generate_until(
        [SimpleNamespace(args=(text[:30], {"until": ["\u0000never"], "max_gen_toks": 6}))]
    )
    assert continuations == [expected]
