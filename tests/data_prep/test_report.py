"""Report of a preparation: its figures, its page in a real browser, adversarial texts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from data_prep.report import (
    PrepReport,
    bin_position,
    histogram_bars,
    length_histogram,
    total_of,
    write_report,
)
from tests.support import browser
from tests.support.prep_reports import empty_report, rich_report


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(rich_report(), folder)
    return folder


def test_lengths_are_binned_exactly() -> None:
    lengths = np.array([1, 2, 3, 4, 7, 8, 2**20 - 1, 2**20, 2**31], dtype=np.int64)
    histogram = length_histogram(lengths)
    assert {int(i): int(histogram[i]) for i in np.flatnonzero(histogram)} == {
        0: 1,
        1: 2,
        2: 2,
        3: 1,
        19: 1,
        20: 1,
        31: 1,
    }
    assert length_histogram(np.array([], dtype=np.int64)).sum() == 0


def test_bars_stand_where_their_lengths_are() -> None:
    counts = [0, 0, 1, 0, 4, 10_000, 0, 0]
    bars = histogram_bars(counts, width=400, height=100)
    assert [bar["exponent"] for bar in bars] == [2, 3, 4, 5] and [
        bar["count"] for bar in bars
    ] == counts[2:6]
    # One document is still visible
    assert bars[-1]["height"] == 100 and bars[1]["height"] == 0 and bars[0]["height"] == 1
    assert bin_position(4, bars) == 0 and bin_position(8, bars) == bars[1]["x"]
    assert bars[2]["x"] < bin_position(24, bars) < bars[3]["x"]
    assert bin_position(3, bars) is None and bin_position(65, bars) is None
    assert histogram_bars([0, 0], 400, 100) == [] == histogram_bars([], 400, 100)


def test_json_holds_the_counts_and_what_follows_from_them(rich: Path) -> None:
    report, report_json = (
        rich_report(),
        json.loads((rich / "report.json").read_text(encoding="utf-8")),
    )
    part, split_json = report.splits[0], report_json["splits"][0]
    assert split_json["bytes_per_token"] == pytest.approx(part.bytes / part.text_tokens)
    assert split_json["packing_efficiency"] == pytest.approx(1 - part.padding_tokens / part.slots)
    assert split_json["cut_share"] == pytest.approx(part.cut_documents / part.documents)
    assert sum(split_json["length_histogram"]) == part.documents
    assert report_json["throughput"]["tokenizer_share"] == pytest.approx(1420 / 1650)
    assert report_json["throughput"]["tokens_per_core_second"] == pytest.approx(230e6 / 1650)
    assert report_json["quarantined"]["invalid UTF-8"]["records"] == 4
    total = total_of(report.splits)
    assert total.documents == 244_800 == sum(total.length_histogram) and total.sequences == sum(
        s.sequences for s in report.splits
    )


def test_a_key_that_the_report_does_not_know_is_refused() -> None:
    with pytest.raises(ValidationError, match="packing_quality"):
        PrepReport.model_validate(
            rich_report().model_dump(exclude_computed_fields=True) | {"packing_quality": 1}
        )


def test_a_report_of_an_empty_dataset_can_be_written(tmp_path: Path) -> None:
    write_report(empty_report(), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (
        "No document." in page and "Nothing." in page and not re.search(r"\b(nan|None|inf)\b", page)
    )
    assert (
        json.loads((tmp_path / "report.json").read_text())["throughput"]["tokens_per_second"]
        is None
    )


def test_text_of_the_corpus_is_escaped(rich: Path) -> None:
    page = (rich / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page), (
        "the page asks for something outside itself"
    )


@pytest.mark.process
@pytest.mark.skipif(not browser.available(), reason="no chromium and chromedriver")
def test_the_page_in_a_browser(rich: Path) -> None:
    with browser.page(rich / "report.html", width=500) as window:
        assert window.get_log("browser") == []
        headings = [h.text for h in window.find_elements("css selector", "h2")]
        assert headings == [
            "Domains and splits",
            "Lengths of documents",
            "Duplicates",
            "Left out",
            "Throughput",
            "Tokenizer",
            "Inputs",
            "Settings",
        ]
        wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert window.execute_script(wide) == 0, "the page is wider than the window"
        bars = window.find_elements("css selector", "figure")[0].find_elements(
            "css selector", "rect.bar"
        )
        filled = np.flatnonzero(rich_report().splits[0].length_histogram)
        assert len([b for b in bars if b.is_displayed() and b.size["height"] > 0]) == len(filled)
        colours = [window.execute_script("return getComputedStyle(document.body).backgroundColor")]
        window.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": "dark"}]},
        )
        colours.append(
            window.execute_script("return getComputedStyle(document.body).backgroundColor")
        )
        assert colours == ["rgb(255, 255, 255)", "rgb(22, 24, 27)"]
