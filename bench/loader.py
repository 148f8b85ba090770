"""Speed of the loader beside StreamingDataset and numpy memmap: rate, start, resume, memory.

`python -m bench.loader` makes a dataset of random rows, then runs every provider in a process of
its own, in turn, several rounds. CPU seconds are those of the process and its children, user and
system; the files are in the page cache. A sample is a row of 2048 inputs. The providers:

- nextpt: all of a Batch (nine tensors), with order, shuffling and prefetch thread;
- memmap: a numpy memmap of tokens and random stretches, as nanoGPT's get_batch reads it: inputs and
  targets;
- memmap, at once: random rows of uint16 by one indexing, as two int64 tensors: the least possible
  work;
- memmap, batch: the same rows made into a Batch by nextpt's collate, so that only storage and order
  differ;
- streaming N: StreamingDataset, shuffled, N workers of DataLoader, tokens as one int64 tensor, as
  llm-foundry has them;
- streaming, batch: the same without workers, made into a Batch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from kernels.bench.machine import describe_machine, write_json

T, VOCABULARY, BATCH = 2048, 32768, 8
# A shard of 4.2 MB, a tenth of the usual: as many shards are open as with large datasets
ROWS, SHARD_ROWS = 24_576, 1024
SHARDS = 100_000  # of the simulated index
FAR = 10**9
SAMPLES = {
    "nextpt": 50_000,
    "memmap": 50_000,
    "memmap, at once": 50_000,
    "memmap, batch": 50_000,
    "streaming 0": 8_000,
    "streaming 1": 8_000,
    "streaming 2": 8_000,
    "streaming, batch": 8_000,
}


def draw_lengths(rng: np.random.Generator) -> np.ndarray:
    """Return the lengths of the segments of a row: documents of a median of 600 tokens, cut."""
    lengths, remaining = [], T + 1
    while remaining:
        lengths.append(min(max(int(rng.lognormal(np.log(600), 1.2)), 3), remaining))
        remaining -= lengths[-1]
        if remaining and remaining < 3:
            lengths[-1], remaining = lengths[-1] + remaining, 0
    return np.array(lengths, np.uint32)


def make_dataset(folder: Path) -> None:
    """Write random rows as a dataset of one domain, and the tokens alone as rows.npy."""
    from data_prep.format import columns
    from data_prep.streaming_compat import import_streaming

    import_streaming()
    from streaming import MDSWriter

    rng = np.random.default_rng(0)
    home = folder / "train" / "web"
    tokens = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.uint16, (ROWS, T + 1))
    row_bytes = 2 * (T + 1) + 60
    writer = MDSWriter(
        columns=columns(T, VOCABULARY),
        out=str(home),
        hashes=["xxh64"],
        size_limit=row_bytes * SHARD_ROWS,
    )
    for i in range(ROWS):
        lengths = draw_lengths(rng)
        tokens[i] = rng.integers(1, VOCABULARY, T + 1, dtype=np.uint16)
        writer.write(
            {
                "tokens": np.asarray(tokens[i]),
                "doc_lens": lengths,
                "doc_flags": np.zeros(len(lengths), np.uint8),
                "domain": np.uint16(0),
                "text_bytes": np.uint32(0),
            }
        )
    writer.finish()
    tokens.flush()
    np.save(folder / "token_bytes.npy", np.arange(VOCABULARY, dtype=np.uint16) % 9)
    (folder / "tokenizer.json").write_text("{}")
    write_manifest(folder, ROWS)


def write_manifest(folder: Path, rows: int) -> None:
    """Write dataset.json."""
    from data_prep.format import DatasetManifest, SplitCounts

    index = (folder / "train" / "web" / "index.json").read_bytes()
    counts = {"documents": 0, "bytes": 0, "tokens": 0, "text_tokens": 0, "padding_tokens": 0}
    manifest = DatasetManifest(
        sequence_length=T,
        vocab_size=VOCABULARY,
        token_dtype="uint16",
        tokenizer_sha256=sha256(b"{}").hexdigest(),
        start_id=0,
        end_id=0,
        seed=0,
        validation_fraction=0,
        inputs_sha256="",
        domains=["web"],
        fingerprint=sha256(index).hexdigest(),
        splits={
            "train": {
                "web": SplitCounts(**counts, sequences=rows, index_sha256=sha256(index).hexdigest())
            },
            "validation": {"web": SplitCounts(**counts, sequences=0, index_sha256="")},
        },
    )
    (folder / "dataset.json").write_text(manifest.model_dump_json())


def simulate(source: Path, folder: Path) -> None:
    """Write a dataset of SHARDS equal shards: only those that the first steps and FAR read."""
    from nextpt.data.mixture import quantise_shares
    from nextpt.data.order import GlobalOrder
    from nextpt.data.plan import DataPlan, Stage

    shard = json.loads((source / "train" / "web" / "index.json").read_text())["shards"][0]
    shards = []
    for i in range(SHARDS):
        raw = shard["raw_data"] | {"basename": f"g{i // 16:05d}/shard.{i % 16:05d}.mds"}
        shards.append(shard | {"raw_data": raw})
    home = folder / "train" / "web"
    home.mkdir(parents=True)
    (home / "index.json").write_text(json.dumps({"shards": shards, "version": 2}, sort_keys=True))
    order = GlobalOrder(
        DataPlan(0, (Stage(0, quantise_shares([1.0]), T),)), [np.full(SHARDS, shard["samples"])]
    )
    for position in (0, FAR):
        for i in order.domains[0].shards_ahead(position, 3)[0]:
            target = home / shards[i]["raw_data"]["basename"]
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source / "train" / "web" / shard["raw_data"]["basename"], target)
    for name in ("token_bytes.npy", "tokenizer.json"):
        shutil.copyfile(source / name, folder / name)
    write_manifest(folder, SHARDS * shard["samples"])


def config_of(folder: Path, scratch: Path) -> Any:
    """Return a config that reads the dataset."""
    from nextpt.config import parse_config

    return parse_config(
        {
            "run": {"name": "bench"},
            "data": {"path": str(folder), "sequence_length": T, "scratch": str(scratch)},
            "model": {"vocab_size": VOCABULARY, "depth": 1, "width": 64, "heads": 1},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 1000, "global_batch_size": 4 * BATCH, "micro_batch_size": BATCH},
        },
        "bench",
    )


def nextpt(folder: Path) -> Iterator[int]:
    """Read batches by our loader; yields samples read."""
    from nextpt.data.loader import Loader

    loader, step = Loader(config_of(folder, folder / "scratch"), 0, 1), 0
    while True:
        yield sum(len(batch.tokens) for batch in loader.step_batches(step))
        step += 1


def memmap(folder: Path, whole: bool = False) -> Iterator[int]:
    """Read rows of rows.npy; yields samples read."""
    import torch

    from data_prep.mds import StoredSequence
    from nextpt.data.batch import collate

    rows, rng = np.load(folder / "rows.npy", mmap_mode="r"), np.random.default_rng(1)
    lengths = [draw_lengths(rng) for _ in range(ROWS)]
    sizes, weights = np.load(folder / "token_bytes.npy").astype(np.int32), np.ones(1, np.float32)
    while True:
        order = rng.permutation(ROWS)
        for first in range(0, ROWS, BATCH):
            chosen = order[first : first + BATCH]
            if whole:
                collate(
                    [
                        StoredSequence(rows[i], lengths[i], np.zeros(len(lengths[i]), np.uint8), 0)
                        for i in chosen
                    ],
                    BATCH,
                    sizes,
                    weights,
                    numbers=chosen,
                    segments=T // 2,
                    context=T,
                )
            else:
                block = rows[chosen].astype(np.int64)
                (
                    torch.from_numpy(block[:, :-1]).contiguous(),
                    torch.from_numpy(block[:, 1:]).contiguous(),
                )
            yield BATCH


def plain_memmap(folder: Path) -> Iterator[int]:
    """Read windows of one stream of tokens; yields samples read."""
    import torch

    rng = np.random.default_rng(1)
    # Past the header of a .npy of this size: one stream of tokens
    data = np.memmap(folder / "rows.npy", np.uint16, "r", offset=128)
    while True:
        positions = rng.integers(0, len(data) - T - 1, BATCH).tolist()
        torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in positions])
        torch.stack([torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in positions])
        yield BATCH


def streaming(folder: Path, workers: int, whole: bool = False) -> Iterator[int]:
    """Read by StreamingDataset and DataLoader; yields samples read."""
    import torch
    from torch.utils.data import DataLoader

    from data_prep.mds import StoredSequence
    from data_prep.streaming_compat import import_streaming
    from nextpt.data.batch import collate

    import_streaming()
    from streaming import StreamingDataset

    sizes, weights = np.load(folder / "token_bytes.npy").astype(np.int32), np.ones(1, np.float32)

    def stack(samples: list[dict]) -> Any:
        if whole:
            return collate(
                [StoredSequence(s["tokens"], s["doc_lens"], s["doc_flags"], 0) for s in samples],
                BATCH,
                sizes,
                weights,
                numbers=range(len(samples)),
                segments=T // 2,
                context=T,
            )
        return torch.from_numpy(np.stack([s["tokens"] for s in samples]).astype(np.int64))

    dataset = StreamingDataset(
        local=str(folder / "train" / "web"),
        shuffle=True,
        shuffle_algo="py1e",
        batch_size=BATCH,
        num_canonical_nodes=1,
    )
    while True:
        for _ in DataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=stack):
            yield BATCH


PROVIDERS: dict[str, Callable[[Path], Iterator[int]]] = {
    "nextpt": nextpt,
    "memmap": plain_memmap,
    "memmap, at once": memmap,
    "memmap, batch": lambda folder: memmap(folder, True),
    **{f"streaming {n}": lambda folder, n=n: streaming(folder, n) for n in (0, 1, 2)},
    "streaming, batch": lambda folder: streaming(folder, 0, True),
}


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and its children."""
    process = psutil.Process()
    return sum(sum(p.cpu_times()[:2]) for p in (process, *process.children(recursive=True)))


def measure(provider: str, folder: Path) -> dict[str, float]:
    """Measure samples per CPU second and per second, after a pass that reads every file once."""
    batches, total = PROVIDERS[provider](folder), SAMPLES[provider]
    warm = 0
    while warm < total // 10:
        warm += next(batches)
    cpu, wall, samples = cpu_seconds(), time.perf_counter(), 0
    while samples < total:
        samples += next(batches)
    cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    return {"per_core": samples / cpu, "per_second": samples / wall}


def status(key: str) -> int:
    """Return the bytes of a line of this process's status."""
    return next(
        1024 * int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(key)
    )


def start(folder: Path, position: int) -> dict[str, float]:
    """Measure the seconds from a config to the first batch at a position, and peak memory."""
    from nextpt.data.loader import Loader

    config = config_of(folder, Path(tempfile.mkdtemp(dir=folder)))
    Path("/proc/self/clear_refs").write_text("5")
    before, began, cpu = status("VmRSS"), time.perf_counter(), time.process_time()
    loader = Loader(config, 0, 1)
    loader.step_batches(position // (4 * BATCH))
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "bytes": status("VmHWM") - before,
    }


def far(folder: Path) -> dict[str, float]:
    """Measure the order alone: from rows per shard to the rows of a block of samples at FAR."""
    from nextpt.data.mixture import quantise_shares
    from nextpt.data.order import GlobalOrder
    from nextpt.data.plan import DataPlan, Stage

    Path("/proc/self/clear_refs").write_text("5")
    before, began, cpu = status("VmRSS"), time.perf_counter(), time.process_time()
    GlobalOrder(
        DataPlan(0, (Stage(0, quantise_shares([3.0, 1.0]), T),)), [np.full(SHARDS, 16_384)] * 2
    ).locate(FAR, FAR + 4096)
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "bytes": status("VmHWM") - before,
    }


def run_apart(*arguments: str) -> dict[str, float]:
    """Run a part of the benchmark in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    completed = subprocess.run(
        [sys.executable, "-m", "bench.loader", *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )
    if completed.returncode:
        raise SystemExit(f"error: {' '.join(arguments)}:\n{completed.stderr[-2000:]}")
    return json.loads(completed.stdout.splitlines()[-1])


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each key."""
    return {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}


def main() -> None:
    """Measure all parts in turn, print tables, write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.loader", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument(
        "--part", nargs=3, metavar=("KIND", "NAME", "FOLDER"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.part:
        kind, name, folder = options.part
        parts = {
            "measure": lambda: measure(name, Path(folder)),
            "start": lambda: start(Path(folder), int(name)),
            "far": lambda: far(Path(folder)),
        }
        print(json.dumps(parts[kind]()), flush=True)
        os._exit(0)  # workers of other libraries need not be waited for

    with tempfile.TemporaryDirectory(prefix="bench-loader-") as name:
        folder = Path(name)
        (folder / "large").mkdir()
        make_dataset(folder)
        simulate(folder, folder / "large")
        rounds_by_provider: dict[str, list[dict[str, float]]] = {
            provider: [] for provider in PROVIDERS
        }
        starts: dict[str, list[dict[str, float]]] = {
            "first batch": [],
            "batch at 10^9": [],
            "order at 10^9": [],
        }
        for _ in range(options.rounds):
            for provider in PROVIDERS:
                rounds_by_provider[provider].append(run_apart("--part", "measure", provider, name))
            starts["first batch"].append(run_apart("--part", "start", "0", f"{name}/large"))
            starts["batch at 10^9"].append(run_apart("--part", "start", str(FAR), f"{name}/large"))
            starts["order at 10^9"].append(run_apart("--part", "far", "-", name))
    result = {
        "machine": (
            describe_machine("cpu") | {n: version(n) for n in ("numpy", "mosaicml-streaming")}
        ),
        "sample": f"{T} inputs, micro-batches of {BATCH}",
        "rounds": options.rounds,
        "providers": {provider: medians(rounds) for provider, rounds in rounds_by_provider.items()},
        "start": {label: medians(rounds) for label, rounds in starts.items()},
    }
    show(result)
    write_json(options.json, result)


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    print(", ".join(f"{k} {v}" for k, v in result["machine"].items()))
    print(
        f"\n| {result['sample']} | samples per CPU second | tokens per CPU second | samples/s |"
        " nextpt to it |\n|---|---|---|---|---|"
    )
    ours = result["providers"]["nextpt"]["per_core"]
    for name, f in result["providers"].items():
        print(
            f"| {name} | {f['per_core']:,.0f} | {f['per_core'] * T / 1e6:,.1f} M |"
            f" {f['per_second']:,.0f} | {ours / f['per_core']:.2f} |"
        )
    print(f"\n| {SHARDS:,} shards | seconds | CPU seconds | memory, MB |\n|---|---|---|---|")
    for name, f in result["start"].items():
        print(f"| {name} | {f['seconds']:.2f} | {f['cpu_seconds']:.2f} | {f['bytes'] / 1e6:,.0f} |")


if __name__ == "__main__":
    main()
