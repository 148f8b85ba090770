"""Speed of tokenizers: tiktoken and the tokenizers library, tokens per second of a core.

    python -m bench.tokenizers [TOKENIZER...] [--text CORPUS] [--megabytes 8] [--json FILE]

A tokenizer is whatever `nextpt tokenizer convert` reads, or `trained`, the default: a byte-level
BPE of 32,768 tokens of the text itself. The text is this Python's standard library, code and prose,
unless another is given.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

# One core, as each worker of a preparation has
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}

from data_prep.documents import read_documents
from data_prep.stdlib_corpus import collect
from data_prep.tokenizer import Tokenizer, convert, train_bpe
from kernels.bench.machine import describe_machine, write_json

ROUNDS = 3
BATCH = 256


def texts_of(corpus: str | None, limit: int, folder: Path) -> list[str]:
    """Return documents of the corpus, evenly from all of it, up to `limit` bytes."""
    if corpus is None:
        collect(folder / "corpus")
        corpus = str(folder / "corpus")
    texts = [document.text for document in read_documents(corpus)]
    step = max(sum(len(text.encode()) for text in texts) // limit, 1)
    return texts[::step]


def encoders(tokenizer: Tokenizer) -> dict[str, Callable[[list[str]], int]]:
    """Return functions that encode texts and count their tokens, by name."""
    library = tokenizer.library

    def batches(encode: Callable[..., list]) -> Callable[[list[str]], int]:
        def run(texts: list[str]) -> int:
            groups = (texts[i : i + BATCH] for i in range(0, len(texts), BATCH))
            return sum(
                len(e.ids) for group in groups for e in encode(group, add_special_tokens=False)
            )

        return run

    functions = {
        "tokenizers encode_batch": batches(library.encode_batch),
        "tokenizers encode_batch_fast": batches(library.encode_batch_fast),
    }
    if tokenizer.encoder == "tiktoken":
        functions["tiktoken"] = lambda texts: sum(map(len, tokenizer.encode_batch(texts)))
    if tokenizer.byte_counts == "column":
        functions[f"{tokenizer.encoder}, with bytes of every token"] = lambda texts: sum(
            len(tokenizer.encode_with_bytes(text)[0]) for text in texts
        )
    return functions


def measure(tokenizer: Tokenizer, texts: list[str]) -> dict[str, dict[str, float]]:
    """Return rates per second of CPU time by name, medians of rounds of all encoders in turn."""
    seconds: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    for _ in range(ROUNDS):
        for name, encode in encoders(tokenizer).items():
            start = time.process_time()
            counts[name] = encode(texts)
            seconds.setdefault(name, []).append(time.process_time() - start)
    assert len(set(counts.values())) == 1, (
        f"{tokenizer.path}: the encoders count differently: {counts}"
    )
    size = sum(len(text.encode()) for text in texts)
    return {
        name: {
            "tokens": counts[name],
            "tokens_per_second": counts[name] / median(s),
            "bytes_per_second": size / median(s),
        }
        for name, s in seconds.items()
    }


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizers", nargs="*", metavar="TOKENIZER", default=["trained"])
    parser.add_argument("--text", metavar="CORPUS")
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    machine = {
        name: text for name, text in describe_machine("cpu").items() if name in ("device", "Python")
    }
    machine |= {name: version(name) for name in ("tiktoken", "tokenizers", "numpy")}
    print("  ".join(f"{name} {text}" for name, text in machine.items()))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        texts = texts_of(arguments.text, int(arguments.megabytes * 1e6), folder)
        size = sum(len(text.encode()) for text in texts)
        print(
            f"{len(texts):,} documents, {size:,} bytes; CPU time of one core, median of {ROUNDS}"
            " rounds\n"
        )
        print(
            f"{'tokenizer':<28} {'bytes/token':>11}  {'encoder':<38} {'Mtokens/s':>9} {'MB/s':>6}"
        )
        results = {}
        for source in arguments.tokenizers:
            path = folder / "tokenizer.json"
            train_bpe(texts, 32768, path) if source == "trained" else convert(source, path)
            results[Path(source).name] = measured = measure(Tokenizer(path), texts)
            for name, rates in measured.items():
                print(
                    f"{Path(source).name:<28} {size / rates['tokens']:>11.2f}  {name:<38}"
                    f" {rates['tokens_per_second'] / 1e6:>9.2f}"
                    f" {rates['bytes_per_second'] / 1e6:>6.2f}",
                    flush=True,
                )
    write_json(
        arguments.json,
        {"machine": machine, "bytes": size, "documents": len(texts), "results": results},
    )


if __name__ == "__main__":
    main()
