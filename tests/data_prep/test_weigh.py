"""Weights of a user's function reach the loss; the rest of the dataset stays what it was; mistakes leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from launcher.cli import app
from nextpt.data.loader import Loader
from nextpt.data.rows import load_manifest
from tests.support.datasets import tiny
from tests.support.layouts import samples_of

FUNCTION = '''import numpy as np
def even(tokens, domain, tokenizer):
    assert tokenizer.vocab_size > tokens.max() and domain in ("code", "prose")
    return np.where(tokens % 2, 0.5, 2.0) * (3 if domain == "code" else 1)
def short(tokens, domain, tokenizer):
    return tokens[1:]
def negative(tokens, domain, tokenizer):
    return -1.0 * tokens
'''


@pytest.fixture
def function(tmp_path: Path) -> Path:
    (tmp_path / "weights.py").write_text(FUNCTION)
    return tmp_path / "weights.py"


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["prep", "weigh", *map(str, arguments)])
    return done.exit_code, done.output


def test_weights_reach_the_batch_and_rows_stay(dataset: Path, function: Path, tmp_path: Path) -> None:
    code, shown = run(dataset, "--weights", f"{function}:even", "--output", tmp_path / "weighted")
    assert code == 0 and "rows with token_weights" in shown, shown
    before, after = load_manifest(dataset), load_manifest(tmp_path / "weighted")
    assert before.fingerprint != after.fingerprint and before.splits["train"]["code"].rows == after.splits["train"]["code"].rows
    for a, b in zip(samples_of(dataset, "train", "code"), samples_of(tmp_path / "weighted", "train", "code"), strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)
    loader = Loader(tiny(tmp_path / "weighted", Path("unused"), objective={"token_weights": True}), 0, 1)
    for batch in loader.step_batches(0):
        expected = np.where(batch.targets % 2 == 0, 2.0, 0.5) * np.where(batch.domain_ids[:, None] == loader.domains.index("code"), 3.0, 1.0)
        np.testing.assert_allclose(batch.token_weights.numpy(), np.where(batch.targets >= 0, expected, 0.0))
    loader.close()
    code, shown = run(dataset, "--weights", f"{function}:even", "--output", tmp_path / "weighted")
    assert code == 2 and "is there; give another output" in shown


@pytest.mark.parametrize(("name", "words"), [
    ("short", "the weights of row 0 of train/code must be 65 finite numbers >= 0, one for each token; got (64,)"),
    ("negative", "must be 65 finite numbers >= 0"), ("none", "has no function none"),
])
def test_mistakes_leave_nothing(dataset: Path, function: Path, tmp_path: Path, name: str, words: str) -> None:
    code, shown = run(dataset, "--weights", f"{function}:{name}", "--output", tmp_path / "out")
    assert code == 2 and words in shown and shown.count("\n") == 1, shown
    assert [p.name for p in tmp_path.iterdir()] == ["weights.py"]


def test_a_place_that_is_no_function_is_told(dataset: Path, tmp_path: Path) -> None:
    code, shown = run(dataset, "--weights", "nowhere.py", "--output", tmp_path / "out")
    assert code == 2 and "expected FILE.py:NAME" in shown
