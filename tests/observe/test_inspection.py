"""The inspection page: complete, escaped, without script or network, and its tooltips."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from data_prep.tokenizer import Tokenizer
from nextpt.observe import inspection
from nextpt.observe.inspection import Inspection, inspect_text, speller, visible, write_inspection
from tests.support import browser as chromium
from tests.support.runs import make_run
from tests.support.tokenizers import ANY_TEXT

TEXT = (
    "The quick <script>document.title = 'broken'</script>\n\tfox \U0001f600 & \u4f60\u597d "
    " caf\u00e9\n"
)


def inspect(folder: Path, kind: str = "byte_level") -> tuple[Inspection, Tokenizer]:
    _, _, tokenizer = make_run(folder / "run", kind, max_position=160)
    return inspect_text(folder / "run", TEXT, "a <b>file</b>"), tokenizer


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ANY_TEXT)
def test_tokens_spell_the_text(tmp_path: Path, kind: str) -> None:
    inspection, tokenizer = inspect(tmp_path, kind)
    assert "".join(t["text"] for t in inspection.tokens) == tokenizer.decode(tokenizer.encode(TEXT))
    for t in inspection.tokens:
        assert (
            t["token"]
            and t["probability"] == pytest.approx(math.exp(-t["nats"]))
            and t["rank"] >= 1
        )
        probabilities = [a["probability"] for a in t["alternatives"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert t["rank"] > 8 or t["alternatives"][t["rank"] - 1]["probability"] == pytest.approx(
            t["probability"]
        )
    most = inspection.most_surprising(5)
    assert [t["nats"] for _, t in most] == sorted(
        (t["nats"] for t in inspection.tokens), reverse=True
    )[:5]
    assert all(inspection.tokens[position - 1] is t for position, t in most)


@pytest.mark.thorough
def test_the_page_is_whole_and_escaped(tmp_path: Path) -> None:
    inspection, _ = inspect(tmp_path)
    write_inspection(inspection, tmp_path / "out")
    page = (tmp_path / "out" / "tokens.html").read_text()
    assert (
        "<script" not in page
        and "a <b>" not in page
        and "default-src 'none'" in page
        and "http:" not in page.replace("http-equiv", "")
    )
    assert (
        page.count('class="t"') == len(inspection.tokens) and "prefers-color-scheme: dark" in page
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "calibration.svg",
        "inspect.json",
        "tokens.html",
    ]
    assert (tmp_path / "out" / "calibration.svg").read_bytes().startswith(b"<?xml")


@pytest.mark.thorough
def test_a_long_text_is_cut_on_the_page_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "MAX_SHOWN", 4)
    result, _ = inspect(tmp_path)
    write_inspection(result, tmp_path / "out")
    page = " ".join((tmp_path / "out" / "tokens.html").read_text().split())
    assert page.count('class="t"') == 4 and f"The first 4 of {len(result.tokens)} tokens" in page
    assert len(result.as_dict()["tokens"]) == len(result.tokens) > 4
    # The end of the text is not scored, so nothing is known of its cost
    assert result.as_dict()["total"]["bpb_with_eod"] is None


@pytest.mark.thorough
def test_names_of_tokens(tmp_path: Path) -> None:
    _, tokenizer = inspect(tmp_path)
    spell = speller(tokenizer)
    assert spell(tokenizer.end_id) == "<|endoftext|>" and spell(10**6) == "<1000000>"
    assert [spell(int(i)) for i in tokenizer.encode(" quick")] == [
        tokenizer.decode([i]) for i in tokenizer.encode(" quick")
    ]
    # No merge of it was trained
    assert "".join(spell(int(i)) for i in tokenizer.encode("\u05d0")) == "<D7><90>"
    assert visible(" a\n\t\r") == "\u2423a\u23ce\u21e5\u240d"


@pytest.mark.process
@pytest.mark.skipif(not chromium.available(), reason="no chromium")
def test_a_browser_shows_alternatives_where_it_is_clicked(tmp_path: Path) -> None:
    inspection, _ = inspect(tmp_path)
    write_inspection(inspection, tmp_path / "out")
    with chromium.page(tmp_path / "out" / "tokens.html") as browser:
        assert (
            browser.title == "a <b>file</b> - nextpt inspect" and browser.get_log("browser") == []
        )
        token = browser.find_elements("css selector", ".t")[1]
        tip = token.find_element("css selector", ".tip")
        assert not tip.is_displayed()
        token.click()
        assert tip.is_displayed() and f"rank {inspection.tokens[1]['rank']}" in tip.text


def test_names_of_bytes_of_a_vocabulary_that_names_them(tmp_path: Path) -> None:
    _, tokenizer = inspect(tmp_path, "llama")
    assert "".join(speller(tokenizer)(int(i)) for i in tokenizer.encode("\U0001f680")).endswith(
        "<0xF0><0x9F><0x9A><0x80>"
    )
