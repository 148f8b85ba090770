"""`nextpt generate`: output, files, and user errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from tests.support.runs import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "run"
    make_run(folder)
    return folder


def nextpt(*arguments: object):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


@pytest.mark.thorough
def test_one_continuation_follows_its_prompt(run: Path) -> None:
    result = nextpt("--run", run, "--prompt", "The", "--max-tokens", 6, "--seed", 1)
    assert (
        result.exit_code == 0
        and result.stdout.startswith("The")
        and len(result.stdout) > 5
        and result.stderr == ""
    )
    assert nextpt("--run", run, "--max-tokens", 3).exit_code == 0  # an empty prompt
    whole = nextpt("--run", run, "--max-tokens", 500, "--temperature", 0, "--min-p", 0.1)
    assert (
        "note: the model's last position is reached (40 tokens, including the prompt)"
        in whole.stderr
    )


@pytest.mark.thorough
def test_json_of_several_prompts_and_samples(run: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "The quick"}\n{"prompt": ""}\n')
    result = nextpt(
        "--run",
        run,
        "--prompts",
        tmp_path / "p.jsonl",
        "--samples",
        2,
        "--max-tokens",
        4,
        "--top-k",
        5,
        "--json",
        tmp_path / "o.json",
    )
    assert (
        result.exit_code == 0 and f"--- {tmp_path}/p.jsonl, line 2, sample 2: " in result.stdout
    ), result.output
    output = json.loads((tmp_path / "o.json").read_text())
    assert (
        output["step"] == 3
        and output["settings"]["top_k"] == 5
        and output["settings"]["temperature"] == 0.8
    )
    assert [(c["prompt"], c["prompt_number"], c["sample"]) for c in output["continuations"]] == [
        ("The quick", 0, 0),
        ("The quick", 0, 1),
        ("", 1, 0),
        ("", 1, 1),
    ]
    for c in output["continuations"]:
        assert (
            c["finish_reason"] in ("length", "end")
            and c["logprob"] == pytest.approx(sum(t["logprob"] for t in c["tokens"]))
            and c["logprob"] < 0
        )
        assert f"{c['prompt']}{c['text']}\n" in result.stdout


@pytest.mark.thorough
def test_beams_and_samples_for_the_report(run: Path, tmp_path: Path) -> None:
    result = nextpt(
        "--run",
        run,
        "--prompt",
        "The",
        "--beams",
        4,
        "--samples",
        2,
        "--max-tokens",
        5,
        "--json",
        tmp_path / "b.json",
    )
    assert result.exit_code == 0 and "sample 2" in result.stdout
    assert json.loads((tmp_path / "b.json").read_text())["settings"] == {
        "beams": 4,
        "length_penalty": 0.6,
        "max_tokens": 5,
        "samples": 2,
        "stop": [],
    }
    for seed in (1, 2, 1):
        assert (
            nextpt(
                "--run", run, "--prompt", "The", "--max-tokens", 5, "--seed", seed, "--save"
            ).exit_code
            == 0
        )
    samples = json.loads((run / "samples.json").read_text())
    assert [s["seed"] for s in samples] == [2, 1] and all(
        s["prompt"] == "The" and s["text"] and s["weights"] == "weight" for s in samples
    )
    # As versions of before 2026-12 wrote them
    older = [{key: s[key] for key in s if key != "weights"} for s in samples]
    (run / "samples.json").write_text(json.dumps(older))
    arguments = ("--prompt", "The", "--max-tokens", 5, "--seed", 1, "--save")
    assert nextpt("--run", run, *arguments).exit_code == 0
    assert json.loads((run / "samples.json").read_text()) == [older[0], samples[1]]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--prompt", "word " * 200],
            (
                "the prompt has 601 tokens with the start token; the model's positions end at 40:"
                " shorten it"
            ),
        ),
        (["--prompt", "a", "--prompts", "x.txt"], "--prompt and --prompts: give one of them"),
        (["--prompts", "x.txt"], "x.txt cannot be read: No such file"),
        (["--top-p", "1.5"], "top_p = 1.5 must be above 0 and at most 1"),
        (["--beams", "2", "--top-p", "0.5"], "--top-p is an option of sampling"),
        (["--beams", "2", "--save"], "--save is an option of sampling"),
        (["--beams", "2", "--samples", "3"], "samples = 3 of beams = 2"),
        (["--length-penalty", "1"], "--length-penalty is an option of the beam search"),
        (["--stop", ""], "a stop string is empty"),
        (["--prompt", "a\udcff"], "the prompt is not UTF-8"),
        (["--max-tokens", "2", "--json", "nowhere/o.json"], "nowhere/o.json cannot be written"),
        (["--step", "9"], "there are: 3"),
    ],
)
def test_user_errors_end_with_one_line(run: Path, arguments: list[str], message: str) -> None:
    result = nextpt("--run", run, *arguments)
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
