"""From corpora to a dataset folder: split, tokenizer, tokens, packed rows, shards, manifest.

Everything is written into OUTPUT.tmp-PID beside the output and renamed when it is whole, so a dataset folder exists or
does not. The split is by a hash of the text alone, so that a document keeps its side whatever else the corpus holds, or
by place.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import xxhash
from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from data_prep.documents import Document, files_of, read_documents
from data_prep.errors import PrepError
from data_prep.files import atomic_write, canonical_json, sha256_file
from data_prep.format import FORMAT_VERSION, SPLITS, DatasetManifest, SplitCounts, token_dtype
from data_prep.shards import PackedSplit, write_split
from data_prep.tokenizer import Tokenizer, train_bpe, write_character_tokenizer

BATCH = 512  # documents per call of the tokenizer, which divides them among the cores


@dataclass(frozen=True)
class PrepSpec:
    """What to prepare. domains: name -> file or folder. One of vocab_size (a tokenizer is trained), tokenizer, characters.

    sequence_length: inputs per row, tokens. heldout: share kept for evaluation. split: "hash" takes that share of the
    documents, "tail" that share of each domain's characters from its end, cutting the document where it begins. seed:
    order of rows.
    """

    domains: dict[str, Path]
    output: Path
    sequence_length: int
    vocab_size: int | None = None
    tokenizer: Path | None = None
    heldout: float = 0.05
    seed: int = 0
    text_field: str = "text"
    id_field: str = "id"
    characters: bool = False
    split: str = "hash"

    def check(self) -> None:
        """Raise PrepError on the first value that makes no sense."""
        if not self.domains:
            raise PrepError("no corpus given; name at least one as DOMAIN=PATH")
        for name in self.domains:
            if not name or not all(c.isalnum() or c in "._-" for c in name) or name.startswith("."):
                raise PrepError(f"domain name {name!r}: expected letters, digits, '.', '_' and '-'")
        if self.sequence_length < 2:
            raise PrepError(f"sequence_length = {self.sequence_length} must be at least 2")
        if not 0 <= self.heldout < 1:
            raise PrepError(f"heldout = {self.heldout} must be at least 0 and below 1")
        if (self.vocab_size is not None) + (self.tokenizer is not None) + self.characters != 1:
            raise PrepError("give one of vocab_size, to train a tokenizer, tokenizer, a tokenizer.json, and characters")
        if self.split not in ("hash", "tail"):
            raise PrepError(f"split = {self.split!r}: expected hash or tail")
        if self.vocab_size is not None:
            token_dtype(self.vocab_size)
        for path in self.domains.values():
            files_of(path)

    def inputs_sha256(self) -> str:
        """Hash of everything the dataset is a function of: the settings and the bytes of all inputs."""
        inputs = {name: [sha256_file(file) for file in files_of(path)] for name, path in self.domains.items()}
        chosen = sha256_file(self.tokenizer) if self.tokenizer else [self.vocab_size, self.characters]
        parts = [inputs, chosen, self.sequence_length, self.heldout, self.split, self.seed, self.text_field, self.id_field, FORMAT_VERSION]
        return sha256(canonical_json(parts).encode()).hexdigest()

    def documents(self, domain: str) -> Iterator[Document]:
        """Documents of a domain; empty ones carry nothing to predict and are passed over."""
        return (d for d in read_documents(self.domains[domain], self.text_field, self.id_field) if d.text)

    def sides(self, domain: str) -> Iterator[tuple[Document, str]]:
        """Every document of a domain with the split it belongs to."""
        if self.split == "hash":
            for document in self.documents(domain):
                yield document, SPLITS[xxhash.xxh64_intdigest(_utf8(document)) < self.heldout * 2**64]
            return
        left = int(sum(len(d.text) for d in self.documents(domain)) * (1 - self.heldout))
        for document in self.documents(domain):
            head, tail = document.text[:left], document.text[left:]
            left = max(left - len(document.text), 0)
            yield from ((Document(document.id, text), split) for text, split in zip((head, tail), SPLITS, strict=True) if text)


def prepare(spec: PrepSpec, *, overwrite: bool = False, console: Console | None = None) -> DatasetManifest:
    """Write the dataset folder `spec.output` and return its manifest; an unchanged dataset is reused.

    Raises PrepError (naming file, line or key) and then leaves the output as it was.
    """
    console = console or Console(quiet=True)
    spec.check()
    inputs = spec.inputs_sha256()
    if (spec.output / "dataset.json").exists() and not overwrite:
        existing = DatasetManifest.load(spec.output)
        if existing.inputs_sha256 == inputs:
            console.print(f"{spec.output} is there and was made from the same inputs")
            return existing
        raise PrepError(f"{spec.output} holds a dataset made from other inputs or settings; give another output or --overwrite")
    if spec.output.exists() and any(spec.output.iterdir()) and not (spec.output / "dataset.json").exists():
        raise PrepError(f"{spec.output} is a folder with other things in it; give a new one")
    staging = spec.output.with_name(f"{spec.output.name}.tmp-{os.getpid()}")
    try:
        _remove_stale(spec.output)
        staging.mkdir(parents=True)
        manifest = _Preparation(spec, inputs, staging, console).run()
        _replace(staging, spec.output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PrepError(f"no space left on the device of {spec.output.absolute().parent}; free some and start again") from error
        raise PrepError(f"{error.filename or spec.output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def is_current(spec: PrepSpec) -> bool:
    """Whether the output is a dataset made from the inputs and settings of `spec`."""
    try:
        return DatasetManifest.load(spec.output).inputs_sha256 == spec.inputs_sha256()
    except PrepError:
        return False


def _remove_stale(output: Path) -> None:
    """Remove what killed preparations left beside the output; those of living processes stay."""
    for folder in output.parent.glob(f"{glob.escape(output.name)}.tmp-*"):
        pid = folder.name.rpartition("-")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder)


def _replace(staging: Path, output: Path) -> None:
    """Put the finished folder in the output's place."""
    if output.exists():
        shutil.rmtree(output)
    os.rename(staging, output)


class _Preparation:
    """One run of `prepare` over its staging folder."""

    def __init__(self, spec: PrepSpec, inputs_sha256: str, folder: Path, console: Console) -> None:
        self.spec, self.inputs_sha256, self.folder, self.console = spec, inputs_sha256, folder, console

    def run(self) -> DatasetManifest:
        spec = self.spec
        tokenizer = self._tokenizer()
        domains = sorted(spec.domains)
        np.save(self.folder / "token_bytes.npy", tokenizer.token_bytes())
        counts: dict[str, dict[str, SplitCounts]] = {split: {} for split in SPLITS}
        for index, domain in enumerate(domains):
            for split, packed in self._tokenize(domain, tokenizer).items():
                counts[split][domain] = write_split(packed, self.folder / split / domain, index, seed=spec.seed)
        manifest = DatasetManifest(
            sequence_length=spec.sequence_length, vocab_size=tokenizer.vocab_size,
            token_dtype=token_dtype(tokenizer.vocab_size).name, tokenizer_sha256=tokenizer.sha256,
            start_id=tokenizer.start_id, end_id=tokenizer.end_id, seed=spec.seed, heldout_fraction=spec.heldout,
            inputs_sha256=self.inputs_sha256, domains=domains, splits=counts, fingerprint="",
        )
        fingerprint = sha256(canonical_json(manifest.model_dump()).encode()).hexdigest()
        manifest = manifest.model_copy(update={"fingerprint": fingerprint})
        with atomic_write(self.folder / "dataset.json") as file:
            file.write(canonical_json(manifest.model_dump()))
        return manifest

    def _tokenizer(self) -> Tokenizer:
        """The given tokenizer, or one trained on the training side of all domains."""
        spec, path = self.spec, self.folder / "tokenizer.json"
        if spec.tokenizer is not None:
            Tokenizer(spec.tokenizer)
            shutil.copyfile(spec.tokenizer, path)
        elif spec.characters:
            # Of both sides: a vocabulary of characters has no way to spell one that only the held-out side has.
            write_character_tokenizer((d.text for name in spec.domains for d in spec.documents(name)), path)
        else:
            self.console.print(f"training a tokenizer of {spec.vocab_size} tokens")
            texts = (d.text for name in sorted(spec.domains) for d, split in spec.sides(name) if split == "train")
            train_bpe(texts, spec.vocab_size, path)
        return Tokenizer(path)

    def _tokenize(self, domain: str, tokenizer: Tokenizer) -> dict[str, PackedSplit]:
        """Tokenize one domain; held-out documents are also written out as text."""
        spec = self.spec
        sizes = tokenizer.token_bytes()
        splits = {split: PackedSplit(spec.sequence_length, tokenizer.end_id, sizes) for split in SPLITS}
        texts = self.folder / "heldout_text"
        texts.mkdir(exist_ok=True)
        total = sum(file.stat().st_size for file in files_of(spec.domains[domain]))
        with _progress(self.console) as progress, open(texts / f"{domain}.jsonl", "w", encoding="utf-8") as heldout:
            task = progress.add_task(f"tokenizing {domain}", total=total)
            documents = spec.sides(domain)
            while group := list(islice(documents, BATCH)):
                encoded = tokenizer.encode_batch([d.text for d, _ in group])
                for (document, split), tokens in zip(group, encoded, strict=True):
                    data = _utf8(document)
                    progress.update(task, advance=len(data))
                    if int(sizes[tokens].sum()) != len(data):
                        raise PrepError(f"document {document.id}: its tokens stand for {int(sizes[tokens].sum())} bytes and its "
                                        f"text has {len(data)}; the tokenizer changes text, so bits per byte would be wrong")
                    splits[split].add(np.concatenate(([tokenizer.start_id], tokens, [tokenizer.end_id])), len(data))
                    if split == "heldout":
                        heldout.write(json.dumps({"id": document.id, "text": document.text}, ensure_ascii=False) + "\n")
            progress.update(task, completed=total)
        if not splits["train"].documents:
            raise PrepError(f"domain {domain} ({spec.domains[domain]}) has no document to train on: it is empty, or all were held out")
        return splits


def _utf8(document: Document) -> bytes:
    try:
        return document.text.encode()
    except UnicodeEncodeError as error:
        raise PrepError(f"document {document.id}: character {error.start} is a lone surrogate, which no UTF-8 text holds") from None


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        console=console, disable=console.quiet or not console.is_terminal,
    )


def summary_table(manifest: DatasetManifest) -> Table:
    """Documents, bytes, tokens, bytes per token and packing efficiency, per split and domain."""
    table = Table(title="dataset", box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("split", no_wrap=True)
    table.add_column("domain", no_wrap=True)
    for heading in ("docs", "bytes", "tokens", "B/token", "rows", "packing"):
        table.add_column(heading, justify="right", no_wrap=True)
    for split, domains in manifest.splits.items():
        for domain, c in domains.items():
            slots = c.rows * (manifest.sequence_length + 1)
            table.add_row(
                split, domain, f"{c.documents:,}", f"{c.bytes:,}", f"{c.text_tokens:,}",
                f"{c.bytes / c.text_tokens:.2f}" if c.text_tokens else "-", f"{c.rows:,}",
                f"{1 - c.padding_tokens / slots:.2%}" if slots else "-",
            )
    return table
