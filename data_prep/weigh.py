"""A dataset once more, with a weight for every token: the optional column token_weights, from a function of the user's."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import PrepError
from data_prep.files import atomic_write, canonical_json, sha256_file
from data_prep.format import SPLITS, DatasetManifest, columns
from data_prep.group import SHARD_BYTES
from data_prep.streaming_compat import import_streaming
from data_prep.tokenizer import Tokenizer

Weights = Callable[[np.ndarray, str, Tokenizer], np.ndarray]


def load_function(place: str) -> Weights:
    """The function of FILE.py:NAME. Raises PrepError."""
    file, _, name = place.rpartition(":")
    if not file or not Path(file).is_file():
        raise PrepError(f"--weights {place}: expected FILE.py:NAME, a function weights(tokens, domain, tokenizer) in a file that is there")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        raise PrepError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
    if not callable(function := getattr(module, name, None)):
        raise PrepError(f"{file} has no function {name}")
    return function


def weigh(dataset: Path, output: Path, weights: Weights, progress: Callable[[int], None] = lambda rows: None) -> DatasetManifest:
    """Write `dataset` to `output` with token_weights = weights(tokens [T+1], domain, tokenizer), fp32 [T+1], of every row.

    The same rows in the same order, another fingerprint. Raises PrepError; the output exists when it is whole.
    """
    manifest, tokenizer = DatasetManifest.load(dataset), Tokenizer(dataset / "tokenizer.json")
    if output.exists():
        raise PrepError(f"{output} is there; give another output")
    folder = output.with_name(f".{output.name}.tmp-{os.getpid()}")
    try:
        raw = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))
        for split in SPLITS:
            for domain in manifest.domains:
                if manifest.splits[split][domain].rows:
                    raw["splits"][split][domain]["index_sha256"] = _weigh_stream(dataset, folder, split, domain, manifest, tokenizer, weights, progress)
        for name in ("tokenizer.json", "token_bytes.npy"):
            shutil.copyfile(dataset / name, folder / name)
        shutil.copytree(dataset / "heldout_text", folder / "heldout_text")
        raw |= {"fingerprint": sha256(canonical_json(raw | {"fingerprint": ""}).encode()).hexdigest()}
        with atomic_write(folder / "dataset.json") as file:
            file.write(canonical_json(raw))
        os.rename(folder, output)
    except OSError as error:
        raise PrepError(f"{error.filename or output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return DatasetManifest.load(output)


def _weigh_stream(dataset: Path, folder: Path, split: str, domain: str, manifest: DatasetManifest, tokenizer: Tokenizer, weights: Weights,
                  progress: Callable[[int], None]) -> str:
    """One domain of one split; returns the hash of its index."""
    import_streaming()
    from streaming import MDSWriter

    home = folder / split / domain
    layout = columns(manifest.sequence_length, manifest.vocab_size, manifest.byte_counts)
    layout |= {"token_weights": f"ndarray:float32:{manifest.sequence_length + 1}"}
    writer = MDSWriter(columns=layout, out=str(home), hashes=["xxh64"], size_limit=SHARD_BYTES)
    for number, row in enumerate(_rows(dataset / split / domain)):
        place = f"row {number} of {split}/{domain}"
        writer.write(row | {"token_weights": _checked(weights, row["tokens"], domain, tokenizer, place)})
        progress(1)
    writer.finish()
    return sha256_file(home / "index.json")


def _rows(stream: Path) -> Iterator[dict[str, Any]]:
    from streaming import LocalDataset

    rows = LocalDataset(local=str(stream))
    yield from (rows[i] for i in range(len(rows)))


def _checked(weights: Weights, tokens: np.ndarray, domain: str, tokenizer: Tokenizer, place: str) -> np.ndarray:
    try:
        found = np.asarray(weights(tokens.astype(np.int64), domain, tokenizer), dtype=np.float32)
    except Exception as error:  # whatever the function does
        raise PrepError(f"the weights of {place}: {type(error).__name__}: {error}") from error
    if found.shape != tokens.shape or not (np.isfinite(found) & (found >= 0)).all():
        raise PrepError(f"the weights of {place} must be {len(tokens)} finite numbers >= 0, one for each token; got {found.shape} of "
                        f"{found.min() if found.size else 'no'} to {found.max() if found.size else 'no'}")
    return found
