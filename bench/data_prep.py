"""Speed of data preparation: `nextpt prep shards` beside other programs, and two workers.

    python -m bench.data_prep [--corpus FILE.jsonl.zst] [--tokenizer FILE] [--rounds 3]
        [--json FILE]

Every provider reads the same .jsonl.zst in a process of its own, one thread in the tokenizer; they
take turns. Time per core is CPU time of the whole process, its start and imports included. Without
a corpus one of 128 MB is made of the sources and documents of this machine's Python packages;
without a tokenizer a byte-level BPE of 32,768 tokens is trained.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import orjson
import zstandard

from bench.data_prep_peers import PEERS
from data_prep.documents import read_documents
from data_prep.tokenizer import convert, evenly_sampled, train_bpe
from kernels.bench.machine import describe_machine, write_json

CORPUS_BYTES = 128_000_000
TRAINING_BYTES = 20_000_000
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Run:
    """Measurement of one run of one provider.

    peak: bytes of its largest process, or of this one if that is more: the kernel's count begins
    there.
    """

    tokens: int
    wall: float
    cpu: float
    peak: int
    tokenizer_share: float | None = None


def make_corpus(path: Path) -> None:
    """Write texts of the packages of this Python, as .jsonl.zst.

    They are other files on another machine.
    """
    folders = [Path(p) for p in (sys.prefix, sys.base_prefix)]
    size = 0
    with open(path, "wb") as raw, zstandard.ZstdCompressor(3).stream_writer(raw) as file:
        for source in (
            p
            for folder in folders
            for p in sorted(folder.rglob("*"))
            if p.suffix in (".py", ".rst", ".md", ".txt", ".h", ".hpp")
        ):
            try:
                text = source.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            file.write(orjson.dumps({"id": str(source), "text": text}) + b"\n")
            size += len(text)
            if size > CORPUS_BYTES:
                return


def run(command: list[str]) -> tuple[str, float, float, int]:
    """Run a command.

    Returns:
        (output, wall seconds, CPU seconds of the process and its children, bytes of the largest).
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | ONE_THREAD
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"error: {' '.join(command)} failed")
    return (
        output,
        time.perf_counter() - started,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * 1024,
    )


def ours(corpus: Path, tokenizer: Path, folder: Path, workers: int) -> Run:
    """Measure `nextpt prep shards` with some workers."""
    _, wall, cpu, peak = run(
        [
            sys.executable,
            "-m",
            "launcher.cli",
            "prep",
            "shards",
            f"all={corpus}",
            "--output",
            str(folder),
            "--tokenizer",
            str(tokenizer),
            "--sequence-length",
            "2048",
            "--workers",
            str(workers),
            "--id-field",
            "",
        ]
    )
    report = json.loads((folder / "report.json").read_text())["throughput"]
    return Run(report["tokens"], wall, cpu, peak, report["tokenizer_share"])


def peer(name: str, corpus: Path, tokenizer: Path, folder: Path) -> Run:
    """Measure a program of bench.data_prep_peers."""
    output, wall, cpu, peak = run(
        [
            sys.executable,
            "-m",
            "bench.data_prep_peers",
            name,
            str(corpus),
            str(tokenizer),
            str(folder),
        ]
    )
    return Run(json.loads(output.splitlines()[-1])["tokens"], wall, cpu, peak)


def main() -> None:
    """Measure all providers in turn, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--tokenizer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    machine = {
        name: text for name, text in describe_machine("cpu").items() if name in ("device", "Python")
    }
    machine |= {
        name: version(name)
        for name in ("tiktoken", "tokenizers", "transformers", "mosaicml-streaming", "numpy")
    }
    print("  ".join(f"{name} {text}" for name, text in machine.items()))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        corpus = arguments.corpus or folder / "corpus.jsonl.zst"
        tokenizer = folder / "tokenizer.json"
        if not arguments.corpus:
            make_corpus(corpus)
        if arguments.tokenizer:
            convert(arguments.tokenizer, tokenizer)
        else:
            train_bpe(
                evenly_sampled((d.text for d in read_documents(corpus)), TRAINING_BYTES),
                32768,
                tokenizer,
            )
        halves = split_in_two(corpus, folder)
        providers = {"nextpt": lambda out: ours(corpus, tokenizer, out, 1)}
        providers |= {
            name: lambda out, name=name: peer(name, corpus, tokenizer, out) for name in PEERS
        }
        providers |= {
            f"nextpt, {n} workers, two files": lambda out, n=n: ours(halves, tokenizer, out, n)
            for n in (1, 2)
        }
        runs_by_name: dict[str, list[Run]] = {name: [] for name in providers}
        for _ in range(arguments.rounds):
            for name, provider in providers.items():
                runs_by_name[name].append(provider(folder / "out"))
                shutil.rmtree(folder / "out")
        size = sum(len(d.text.encode()) for d in read_documents(corpus))
    show(machine, size, runs_by_name, arguments.json)


def split_in_two(corpus: Path, folder: Path) -> Path:
    """Write the documents to two files of about equal size: one worker reads a compressed file."""
    (folder / "halves").mkdir()
    writers = [
        zstandard.ZstdCompressor(3).stream_writer(
            open(folder / f"halves/{i}.jsonl.zst", "wb"),  # noqa: SIM115 (the writer closes it)
            closefd=True,
        )
        for i in range(2)
    ]
    sizes = [0, 0]
    for document in read_documents(corpus):
        smaller = sizes.index(min(sizes))
        writers[smaller].write(orjson.dumps({"text": document.text}) + b"\n")
        sizes[smaller] += len(document.text)
    for writer in writers:
        writer.close()
    return folder / "halves"


def show(
    machine: dict[str, str], size: int, runs_by_name: dict[str, list[Run]], path: Path | None
) -> None:
    """Print the table with ratios to nextpt; write the JSON."""
    print(f"{size / 1e6:.0f} MB of text; medians of {len(runs_by_name['nextpt'])} rounds\n")
    print(
        f"{'':<32} {'Mtokens/s/core':>14} {'ratio':>6} {'wall s':>7} {'MiB':>6}  inside the"
        " tokenizer"
    )
    rates = {name: median(r.tokens / r.cpu for r in runs) for name, runs in runs_by_name.items()}
    walls = {name: median(r.wall for r in runs) for name, runs in runs_by_name.items()}
    for name, runs in runs_by_name.items():
        share = (
            f"{median(r.tokenizer_share for r in runs):.0%}"
            if runs[0].tokenizer_share is not None
            else ""
        )
        print(
            f"{name:<32} {rates[name] / 1e6:>14.2f} {rates['nextpt'] / rates[name]:>6.2f}"
            f" {walls[name]:>7.1f} {max(r.peak for r in runs) / 2**20:>6.0f}  {share}"
        )
    single, double = (walls[f"nextpt, {n} workers, two files"] for n in (1, 2))
    print(f"\ntwo workers: {single / double:.2f} times as fast as one (wall time, start included)")
    write_json(
        path,
        {
            "machine": machine,
            "bytes": size,
            "speedup_of_two": single / double,
            "providers": {
                name: {
                    "tokens_per_core_second": rates[name],
                    "wall_seconds": walls[name],
                    "peak_bytes": max(r.peak for r in runs),
                    "tokenizer_share": runs[0].tokenizer_share,
                    "tokens": runs[0].tokens,
                }
                for name, runs in runs_by_name.items()
            },
        },
    )


if __name__ == "__main__":
    main()
