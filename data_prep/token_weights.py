"""Token weights: a copy of a dataset with the optional column `token_weights` of format.py."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.format import FORMAT_VERSION, DatasetManifest, columns
from data_prep.group import SHARD_BYTES
from data_prep.stored import read_sequences, shards_of
from data_prep.streaming_compat import import_streaming
from nextpt.base.errors import DataPrepError
from nextpt.base.files import (
    atomic_write,
    canonical_json,
    expand_home,
    sha256_file,
    temporary_path,
)

Weigh = Callable[[dict[str, Any]], np.ndarray]


def load_function(reference: str) -> Weigh:
    """Load the function of FILE.py:NAME.

    Raises:
        DataPrepError: When there is no such file or function, or the file fails.
    """
    file, _, name = expand_home(reference).rpartition(":")
    if not Path(file).is_file():
        raise DataPrepError(
            f"{reference}: expected FILE.py:NAME, a function of a sequence in a file that is there"
        )
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise DataPrepError(f"{file} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        raise DataPrepError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
    function: Weigh | None = getattr(module, name, None)
    if function is None or not callable(function):
        raise DataPrepError(f"{file} has no function {name}")
    return function


def add_token_weights(dataset: Path, output: Path, weigh: Weigh) -> None:
    """Write `dataset` to `output` with the column token_weights = weigh(sequence).

    The output appears whole or not at all.

    Args:
        dataset: Dataset folder.
        output: Folder to write, which must not exist.
        weigh: Maps a sequence (the columns of data_prep.format.columns, `tokens` [T + 1] and the
            number `domain` among them) to weights [T + 1]: the factor on the loss of each token
            where it is the target, finite and >= 0.

    Raises:
        DataPrepError: When weights are invalid or the output exists.
    """
    manifest = DatasetManifest.load(dataset)
    if output.exists():
        raise DataPrepError(f"{output} exists; give another folder, or remove it")
    staging = temporary_path(output)
    try:
        staging.mkdir(parents=True)
        splits = {
            split: {
                domain: counts.model_copy(
                    update={
                        "index_sha256": _write(dataset, staging, manifest, split, domain, weigh)
                    }
                )
                for domain, counts in domains.items()
            }
            for split, domains in manifest.splits.items()
        }
        for name in ("tokenizer.json", "token_bytes.npy"):
            shutil.copyfile(dataset / name, staging / name)
        shutil.copytree(dataset / manifest.text_folder, staging / "validation_text")
        weighted = manifest.model_copy(
            update={"format_version": FORMAT_VERSION, "splits": splits, "inputs_sha256": ""}
        )
        fingerprint = {"fingerprint": weighted.content_sha256()}
        with atomic_write(staging / "dataset.json") as file:
            file.write(canonical_json(weighted.model_copy(update=fingerprint).model_dump()))
        os.rename(staging, output)
    except OSError as error:
        raise DataPrepError(f"{error.filename or output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(
    dataset: Path, output: Path, manifest: DatasetManifest, split: str, domain: str, weigh: Weigh
) -> str:
    """Write the shards of one domain of one split; return the hash of their index, or ""."""
    shards = shards_of(dataset, manifest, split, domain)
    if not shards:
        return ""
    length, folder = manifest.sequence_length + 1, output / split / domain
    layout = columns(manifest.sequence_length, manifest.vocab_size, manifest.byte_counts) | {
        "token_weights": f"ndarray:float32:{length}"
    }
    writer = import_streaming().MDSWriter(
        columns=layout,
        out=str(folder),
        compression=shards[0].entry["compression"],
        hashes=["xxh64"],
        size_limit=SHARD_BYTES,
    )
    for shard in shards:
        for sequence in read_sequences(shard):
            try:
                weights = np.asarray(weigh(sequence), dtype=np.float32)
            except Exception as error:  # whatever the function does
                raise DataPrepError(
                    f"token weights of a sequence of {split}/{domain}: {type(error).__name__}:"
                    f" {error}"
                ) from error
            if weights.shape != (length,) or not (np.isfinite(weights) & (weights >= 0)).all():
                raise DataPrepError(
                    f"token weights of a sequence of {split}/{domain}: expected {length} finite"
                    f" numbers >= 0, got shape {weights.shape}, lowest"
                    f" {weights.min(initial=np.inf)}, highest {weights.max(initial=-np.inf)}"
                )
            writer.write(sequence | {"token_weights": weights})
    writer.finish()
    return sha256_file(folder / "index.json")
