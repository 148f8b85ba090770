"""The optional column of token weights, from the shard to the loss."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from data_prep.token_weights import add_token_weights, load_function
from data_prep.tokenizer import Tokenizer
from launcher.cli import app
from nextpt.base.errors import DataError, DataPrepError
from nextpt.data.loader import Loader
from nextpt.model import build_decoder
from nextpt.objective import local_weight_sum, next_token_loss
from tests.support.datasets import tiny
from tests.support.layouts import rewrite


@pytest.fixture(scope="module")
def weighted(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset with weights: 2 for tokens of even id, 0.5 for odd ones."""
    return rewrite(
        dataset,
        tmp_path_factory.mktemp("weighted") / "shards",
        extra={"token_weights": "ndarray:float32:65"},
        change=lambda s: (
            s | {"token_weights": np.where(s["tokens"] % 2, 0.5, 2.0).astype(np.float32)}
        ),
    )


@pytest.mark.thorough
@pytest.mark.parametrize("used", [True, False])
def test_weights_of_the_shards_reach_the_batch_if_requested(weighted: Path, used: bool) -> None:
    config = tiny(
        weighted, Path("unused"), objective={"token_weights": used, "domain_weights": {"code": 3.0}}
    )
    loader = Loader(config, 0, 1)
    for batch in loader.step_batches(0):
        factor = np.where(batch.domain_ids[:, None] == loader.domains.index("code"), 3.0, 1.0)
        own = np.where(batch.targets % 2 == 0, 2.0, 0.5) if used else 1.0
        expected = np.where(batch.targets >= 0, factor * own, 0.0)
        np.testing.assert_allclose(batch.token_weights.numpy(), expected)
    loader.close()


def test_missing_weights_are_refused_but_padding_needs_none(dataset: Path, weighted: Path) -> None:
    train = {"global_batch_size": 12, "micro_batch_size": 4}
    with pytest.raises(DataError, match="no token_weights column"):
        Loader(tiny(dataset, Path("unused"), objective={"token_weights": True}), 0, 1).step_batches(
            0
        )
    loader = Loader(
        tiny(weighted, Path("unused"), objective={"token_weights": True}, train=train), 2, 3
    )
    (batch,) = loader.validation_batches(0, 3)  # all three sequences are rank 0's
    assert float(batch.token_weights.sum()) == 0 and (batch.targets < 0).all()


@pytest.mark.thorough
def test_a_weight_multiplies_what_its_domain_gives_the_gradient_and_only_ratios_count(
    dataset: Path,
) -> None:
    """With weight w: (w G_code + G_prose) / (w n_code + n_prose).

    G is the gradient of a domain's summed nats, n the number of its targets.
    """

    def gradient(weights: dict[str, float], divided: bool = True) -> tuple[torch.Tensor, float]:
        loader = Loader(tiny(dataset, Path("unused"), objective={"domain_weights": weights}), 0, 1)
        batches, model = loader.step_batches(0), build_decoder(loader.config)
        loader.close()
        total = local_weight_sum(batches)
        for batch in batches:
            next_token_loss(model, batch, total if divided else 1.0).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]).double(), float(total)

    (code, targets), (prose, others) = (
        gradient({"prose": 0.0}, divided=False),
        gradient({"code": 0.0}, divided=False),
    )
    assert targets > 0 and others > 0
    torch.testing.assert_close(
        gradient({"code": 3.0})[0],
        (3 * code + prose) / (3 * targets + others),
        rtol=1e-4,
        atol=1e-7,
    )
    torch.testing.assert_close(
        gradient({"code": 3.0, "prose": 3.0})[0], gradient({})[0], rtol=1e-4, atol=1e-7
    )


@pytest.mark.thorough
def test_the_recipe_of_the_docs_writes_the_column(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = re.search(
        r"```python\n(.*?)```",
        (Path(__file__).resolve().parents[2] / "docs" / "ablation.md").read_text(),
        re.DOTALL,
    )[1]
    monkeypatch.chdir(tmp_path)
    Path("data/demo").mkdir(parents=True)
    Path("data/demo/shards").symlink_to(dataset)
    Path("weights.py").write_text(recipe)
    command = [
        "prep",
        "weigh",
        "data/demo/shards",
        "--weights",
        "weights.py:blanks",
        "--output",
        "data/demo/weighted",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and "sequences with token_weights" in result.output, result.output
    weighted, tokenizer = tmp_path / "data/demo/weighted", Tokenizer(dataset / "tokenizer.json")
    plain = Loader(tiny(dataset, tmp_path), 0, 1)
    loader = Loader(tiny(weighted, tmp_path, objective={"token_weights": True}), 0, 1)
    for unweighted, batch in zip(plain.step_batches(0), loader.step_batches(0), strict=True):
        blank = np.array(
            [t >= 0 and tokenizer.decode([t]).isspace() for t in batch.targets.flatten().tolist()]
        ).reshape(batch.targets.shape)
        assert 0 < blank.mean() < 0.5 and (batch.tokens == unweighted.tokens).all()
        np.testing.assert_allclose(
            batch.token_weights.numpy(), np.where(blank, 0.25, 1) * (batch.targets >= 0).numpy()
        )
    assert (
        sum(1 for _ in loader.validation_batches(0, 3))
        == sum(1 for _ in plain.validation_batches(0, 3))
        > 0
    )
    plain.close(), loader.close()


def test_invalid_weights_leave_nothing_behind(dataset: Path, tmp_path: Path) -> None:
    for weigh in (
        lambda row: np.ones(64),
        lambda row: -np.ones(65),
        lambda row: np.full(65, np.nan),
    ):
        with pytest.raises(
            DataPrepError,
            match=r"weights of a sequence of train/code: expected 65 finite numbers >= 0",
        ):
            add_token_weights(dataset, tmp_path / "out", weigh)
        assert not list(tmp_path.iterdir())
    with pytest.raises(DataPrepError, match="exists; give another folder"):
        add_token_weights(dataset, tmp_path, lambda row: np.ones(65))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.py:f", "expected FILE.py:NAME"),
        ("weights.py", "expected FILE.py:NAME"),
        ("weights.py:g", "weights.py has no function g"),
        ("broken.py:f", "broken.py cannot be run: ZeroDivisionError"),
        ("weights.txt:f", "its name must end in .py"),
    ],
)
def test_invalid_functions_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (
        ("weights.py", "def f(row): return row"),
        ("broken.py", "1 / 0"),
        ("weights.txt", ""),
    ):
        Path(name).write_text(text)
    with pytest.raises(DataPrepError, match=re.escape(message)):
        load_function(path)


def test_a_failing_function_is_named_with_the_row(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataPrepError, match="token weights of a sequence of train/code: KeyError: 'none'"
    ):
        add_token_weights(dataset, tmp_path / "out", lambda row: row["none"])
