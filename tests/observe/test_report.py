"""The report: what it reads, what it shows, and that a browser without network renders it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextpt.base.errors import DataError
from nextpt.base.pages import readable_duration
from nextpt.config import Config, to_yaml
from nextpt.events import RollbackEvent, SkipEvent
from nextpt.observe.curves import running_mean, thin
from nextpt.observe.report import default_output, write_report
from nextpt.observe.run_record import read_runs
from tests.support import browser as chromium
from tests.support.datasets import tiny

HOSTILE = "</pre><script>document.title = 'broken'</script><img src=x onerror=alert(1)>"


def figures(nats: float) -> dict[str, Any]:
    return {
        "tokens": 1000,
        "bytes": 3000,
        "nats_per_token": nats,
        "bits_per_token": nats / math.log(2),
        "perplexity": math.exp(nats),
        "bpb": nats / math.log(2) / 3,
    }


def make_run(
    dataset: Path,
    folder: Path,
    *,
    steps: int = 40,
    offset: float = 0.0,
    full: bool = True,
    **overrides: Any,
) -> Path:
    """A run folder as training leaves it.

    Args:
        dataset: Dataset of the run.
        folder: Folder to write.
        steps: Logged steps.
        offset: Added to every loss.
        full: With validation, evaluation, samples and two starts.
        **overrides: Sections of the config.
    """
    config: Config = tiny(dataset, folder, train={"steps": max(steps, 40)}, **overrides)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    lines = []
    for step in range(1, steps + 1):
        nats = 6 / math.sqrt(step) + offset
        lines.append(train_event(step, config.batches.consumed_tokens(step), nats))
        if full and step % 10 == 0:
            lines.append(validation_event(step, config.batches.consumed_tokens(step), nats))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if full:
        write_evaluation(folder, steps)
        write_samples(folder, steps)
        write_starts(folder)
    return folder


def train_event(step: int, tokens: int, nats: float) -> dict[str, Any]:
    domains = {
        d: {"nats_per_token": nats + n, "bpb": (nats + n) / 3}
        for n, d in enumerate(("code", "prose"))
    }
    return {
        "kind": "train",
        "step": step,
        "tokens": tokens,
        "loss": nats,
        "bpb": nats / 3,
        "lr": 1e-3,
        "grad_norm": 1 / step,
        "tokens_per_second": 5000.0 + step,
        "data_wait_seconds": 0.001,
        "memory_bytes": 2**29,
        "mfu": None,
        "domains": domains,
        "z_loss": 0.0,
        "time": 1e9 + step,
    }


def validation_event(step: int, tokens: int, nats: float) -> dict[str, Any]:
    return {
        "kind": "validation",
        "step": step,
        "tokens": tokens,
        "time": 1e9 + step,
        "domains": {"code": figures(nats), "prose": figures(nats + 1)},
        "total": figures(nats),
    }


def write_evaluation(folder: Path, step: int) -> None:
    compressors = {
        n: {"bpb_concatenated": b, "bpb_documents": b + 0.5}
        for n, b in (("zlib -9", 2.5), ("bz2 -9", 2.2), ("xz -9e", 2.1))
    }
    evaluation = {
        "run": str(folder),
        "step": step,
        "window": 64,
        "stride": 32,
        "total": figures(1.0),
        "domains": {
            d: figures(1.0) | {"documents": 7, "compressors": compressors}
            for d in ("code", "prose")
        },
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))


def write_samples(folder: Path, step: int) -> None:
    sample = {"step": step, "temperature": 0.7, "top_k": None, "top_p": 0.95, "seed": 1}
    samples = [
        sample | {"prompt": "def f(", "text": HOSTILE},
        sample | {"prompt": "", "text": "x"},
    ]
    (folder / "samples.json").write_text(json.dumps(samples))


def write_starts(folder: Path) -> None:
    start = {
        "time": 1e9,
        "command": "launcher/run.py --config c.yaml",
        "world_size": 2,
        "hosts": {"node-1": 2},
        "cuda": None,
        "devices": {"a processor, 2 cores": 2},
        "zero_stage": 1,
        "system": "Linux 6",
        "host_memory_bytes": 2**34,
        "commit": "abc123",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
    }
    starts = [start | {"first_step": 1}, start | {"first_step": 21}]
    (folder / "environment.json").write_text(json.dumps({"starts": starts}))


class Links(HTMLParser):
    """Targets that a page would fetch, and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.targets: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.targets += [
            value or ""
            for name, value in attrs
            if name in ("src", "href", "srcset", "action", "data")
        ]


@pytest.mark.thorough
def test_the_page_is_whole_and_fetches_nothing(dataset: Path, tmp_path: Path) -> None:
    run = make_run(dataset, tmp_path / "run")
    write_report([run], default_output([run]))
    page = (run / "report.html").read_text()
    links = Links(page)
    assert "script" not in links.tags and all(
        target.startswith("data:") for target in links.targets
    )
    assert links.tags.count("img") == 8 and HOSTILE not in page and "&lt;script&gt;" in page
    for text in (
        "complete",
        "xz -9e",
        "2.100 / 2.600",
        "node-1 (2)",
        "abc123",
        "def f(",
        "empty prompt",
        "vocab_size: 512",
        "perplexity",
    ):
        assert text in " ".join(page.split()), text


def test_files_with_the_old_metric_names_are_read_under_the_new_ones(
    dataset: Path, tmp_path: Path
) -> None:
    run = make_run(dataset, tmp_path / "run")
    (new,) = read_runs([run])
    for name in ("metrics.jsonl", "evaluation.json"):
        old = (run / name).read_text().replace('"perplexity": ', '"bpb_code": 1.0, "perplexity": ')
        # A step's record has always called it `bpb`; figures of domains called it `bpb_text`
        (run / name).write_text(re.sub(r'("perplexity": [\d.e+]+, )"bpb"', r'\1"bpb_text"', old))
        assert '"bpb_text"' in (run / name).read_text()
    (old,) = read_runs([run])
    assert all(f.pop("bpb_with_eod") == 1.0 for f in old.evaluation["domains"].values())
    assert old.evaluation.pop("total").pop("bpb_with_eod") == 1.0
    new.evaluation.pop("total")
    assert old.evaluation == new.evaluation
    assert [e["total"]["bpb"] for e in old.validation] == [
        e["total"]["bpb"] for e in new.validation
    ]
    assert "bpb_text" not in str(old.validation) and old.train == new.train


@pytest.mark.thorough
def test_equal_runs_give_equal_plots(dataset: Path, tmp_path: Path) -> None:
    run = make_run(dataset, tmp_path / "run")
    for name in "ab":
        write_report([run], tmp_path / name)
    images = [re.findall(r'src="(data:[^"]+)"', (tmp_path / name).read_text()) for name in "ab"]
    assert images[0] == images[1]


@pytest.mark.thorough
def test_several_runs_share_the_plots_and_show_what_differs(dataset: Path, tmp_path: Path) -> None:
    runs = [
        make_run(dataset, tmp_path / "x" / "one"),
        make_run(dataset, tmp_path / "y" / "one", offset=0.3, optimizer={"lr": 9e-3}),
        make_run(dataset, tmp_path / "bare", full=False),
    ]
    write_report(runs, tmp_path / "all.html")
    page = (tmp_path / "all.html").read_text()
    assert (
        "optimizer.lr" in page
        and '<td class="left">0.009</td>' in page
        and "run.dir</code>" not in page
    )
    assert str(tmp_path / "x" / "one") in page and str(tmp_path / "y" / "one") in page
    assert page.count("Loss on code") >= 2 and "None yet" in page and "Not recorded" in page


@pytest.mark.thorough
def test_averages_of_the_weights_are_shown_by_name(dataset: Path, tmp_path: Path) -> None:
    run = make_run(dataset, tmp_path / "run")
    write_report([run], tmp_path / "plain.html")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for event in lines:
        if event["kind"] == "validation":
            domains = {"code": figures(0.7125), "prose": figures(1.7125)}
            event["averages"] = {"ema-0.99": {"domains": domains, "total": figures(1.0)}}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report([run], tmp_path / "averages.html")
    plain, averages = ((tmp_path / f"{n}.html").read_text() for n in ("plain", "averages"))
    assert "prose, ema-0.99 ends at 1.712 on the validation split" in averages
    table = averages[averages.index("Validation as a table") :]
    assert table.count('<td class="left">ema-0.99</td>') == 8
    assert table.count('<td class="left">trained</td>') == 8 and "0.7125" in table
    assert "ema-" not in plain and '<td class="left">trained</td>' not in plain


@pytest.mark.thorough
def test_a_run_just_begun_has_a_report(dataset: Path, tmp_path: Path) -> None:
    run = make_run(dataset, tmp_path / "run", steps=1, full=False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 2, "to')  # being written
    write_report([run], tmp_path / "r.html")
    assert "at step 1 of 40 (2%)" in (tmp_path / "r.html").read_text()


@pytest.mark.thorough
def test_losses_that_are_not_numbers_are_reported(dataset: Path, tmp_path: Path) -> None:
    run = make_run(dataset, tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[30] |= {
        "loss": math.nan,
        "grad_norm": math.inf,
        "domains": {"code": {"nats_per_token": math.nan, "bpb": math.nan}},
    }
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report([run], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "1 logged steps have a loss that is not finite" in page


@pytest.mark.thorough
def test_actions_of_the_guard_are_reported(dataset: Path, tmp_path: Path) -> None:
    run = make_run(dataset, tmp_path / "run")
    events = [
        SkipEvent(7, "loss spike", 9.0, 1.0, 1, 1, 3.0, 2.0),
        SkipEvent(8, "loss not finite", math.nan, math.inf, 2, 2),
        RollbackEvent(6, 7, 8, "loss not finite", 48, 64, 1),
    ]
    with open(run / "metrics.jsonl", "a") as file:
        file.write("".join(json.dumps(dataclasses.asdict(event)) + "\n" for event in events))
    write_report([run], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert (
        "2 steps were skipped by the guard (1 loss not finite, 1 loss spike), the first is step 7"
        in page
    )
    assert (
        "rolled back to step 6 after bad steps 7 to 8 (loss not finite); sequences 48 to 63 were"
        " skipped" in page
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no folder", "does not exist"),
        ("no config", "has no config.yaml"),
        ("no metrics", "has no logged step yet"),
        ("bad evaluation", "evaluation.json cannot be read"),
    ],
)
def test_folders_that_are_not_runs_are_named(
    dataset: Path, tmp_path: Path, damage: str, message: str
) -> None:
    run = tmp_path / "run"
    if damage != "no folder":
        make_run(dataset, run)
    {
        "no config": lambda: (run / "config.yaml").unlink(),
        "no metrics": lambda: (run / "metrics.jsonl").unlink(),
        "bad evaluation": lambda: (run / "evaluation.json").write_text("{"),
        "no folder": lambda: None,
    }[damage]()
    with pytest.raises(DataError, match=re.escape(str(run))) as error:
        write_report([run], tmp_path / "r.html")
    assert message in str(error.value) and not (tmp_path / "r.html").exists()


@pytest.mark.thorough
def test_a_repeated_run_and_an_unwritable_file_are_refused(dataset: Path, tmp_path: Path) -> None:
    run = make_run(dataset, tmp_path / "run")
    with pytest.raises(DataError, match="given twice"):
        read_runs([run, tmp_path / "run" / ".." / "run"])
    with pytest.raises(DataError, match="cannot be written"):
        write_report([run], run / "config.yaml" / "report.html")


@pytest.mark.thorough
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(4, 50))
def test_thinning_keeps_the_ends_and_the_extremes(values: list[float], most: int) -> None:
    y = np.array(values)
    x = np.arange(len(y), dtype=float)
    thin_x, thin_y = thin(x, y, most)
    assert len(thin_x) <= max(most + 2, 1) and {x[0], x[-1]} <= set(thin_x)
    assert thin_y.min() == y.min() and thin_y.max() == y.max() and (np.diff(thin_x) > 0).all()


def test_running_mean_of_a_constant_is_the_constant_and_gaps_are_left_out() -> None:
    y = np.full(300, 2.0)
    y[100:103] = np.nan
    assert np.allclose(running_mean(y), 2.0)
    assert np.isnan(running_mean(np.full(4, np.nan))).all()
    assert running_mean(np.arange(300.0))[150] == pytest.approx(150)


def test_readable_durations() -> None:
    assert [readable_duration(n) for n in (5, 600, 3 * 3600 + 120, 86400 * 3)] == [
        "5 seconds",
        "10 minutes",
        "3 hours and 2 minutes",
        "3 days",
    ]


@pytest.mark.slow
@pytest.mark.skipif(
    not chromium.available(), reason="Debian's chromium and chromium-driver are not installed"
)
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_renders_it(dataset: Path, tmp_path: Path, width: int) -> None:
    runs = [make_run(dataset, tmp_path / "one"), make_run(dataset, tmp_path / "two", offset=0.2)]
    write_report(runs, tmp_path / "all.html")
    with chromium.page(tmp_path / "all.html", width) as browser:
        deadline = time.monotonic() + 120
        while browser.execute_script("return document.readyState") != "complete":
            assert time.monotonic() < deadline
        assert browser.get_log("browser") == []
        assert browser.title == "one, two - nextpt report"
        sizes = browser.execute_script(
            "return [...document.images].map(i => [i.naturalWidth, i.clientWidth, i.alt.length])"
        )
        assert len(sizes) == 10 and all(
            natural > 300 and shown > 250 and alt > 10 for natural, shown, alt in sizes
        )
        assert browser.execute_script(
            "return document.documentElement.scrollWidth <= window.innerWidth"
        ), "the page scrolls sideways"
        assert (
            browser.execute_script(
                "return performance.getEntriesByType('resource').filter(e =>"
                " !e.name.startsWith('data:')).length"
            )
            == 0
        )
        text = browser.find_element("tag name", "body").text
        assert (
            "Config keys that differ" not in text
            and "Evaluation on held-out documents" in text
            and "node-1 (2)" in text
        )
        browser.save_screenshot(str(tmp_path / "page.png"))
    assert (tmp_path / "page.png").stat().st_size > 50_000
