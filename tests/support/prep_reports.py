"""Made-up reports of preparations: one with every section filled, and an empty one."""

from __future__ import annotations

import numpy as np

from data_prep.report import (
    BadRecord,
    Duplicates,
    DuplicateText,
    InputReport,
    PrepReport,
    Quarantined,
    SplitReport,
    Throughput,
    TokenizerReport,
    length_histogram,
)

ADVERSARIAL = "<script>alert('x')</script> & \"quotes\" \x00 \ud800 é 漢字 " + "word " * 40


def rich_report() -> PrepReport:
    """Two domains, both splits, something in every section, and adversarial texts."""
    bad = BadRecord(
        file="s3://bucket/crawl/part-00017.jsonl.zst",
        position="line 41,207",
        detail=f"not a JSON object: {ADVERSARIAL[:60]}",
    )
    return PrepReport(
        name="web-and-code",
        fingerprint="ab12" * 16,
        version="0.1.0",
        finished=1_795_000_000.0,
        sequence_length=2048,
        documents_read=247_003,
        splits=_splits(),
        duplicates=_duplicates(),
        filtered={"repeated text": 1_204, "shorter than 64 bytes": 890},
        quarantined={
            "not a JSON object": Quarantined(records=105, examples=[bad, bad]),
            "invalid UTF-8": Quarantined(records=4, examples=[bad]),
        },
        throughput=_throughput(),
        tokenizer=_tokenizer(),
        settings={
            "packing": "best_fit",
            "seed": 0,
            "validation_fraction": 0.02,
            "deduplicate": True,
            "min_bytes": 64,
            "compression": None,
        },
        inputs=[
            InputReport(
                domain="code", location="data/code/**/*.jsonl.zst", files=412, bytes=140_000_000
            ),
            InputReport(domain="prose", location="s3://bucket/crawl/", files=96, bytes=100_000_000),
        ],
    )


def _splits() -> list[SplitReport]:
    random = np.random.default_rng(0)
    splits = []
    for split, documents in (("train", 120_000), ("validation", 2_400)):
        for domain, median in (("code", 900), ("prose", 350)):
            lengths = np.exp(random.normal(np.log(median), 1.2, documents)).astype(np.int64) + 2
            tokens = int(lengths.sum())
            sequences = int(tokens / 2049 * 1.001) + 1
            cut = int((lengths > 2049).sum())
            splits.append(
                SplitReport(
                    split=split,
                    domain=domain,
                    documents=documents,
                    bytes=int(tokens * 3.9),
                    tokens=tokens - documents,
                    text_tokens=tokens - 2 * documents,
                    sequences=sequences,
                    slots=sequences * 2049,
                    padding_tokens=sequences * 2049 - tokens,
                    pieces=documents + 2 * cut,
                    cut_documents=cut,
                    length_histogram=length_histogram(lengths).tolist(),
                )
            )
    return splits


def _duplicates() -> Duplicates:
    return Duplicates(
        documents=1_204,
        bytes=3_400_000,
        dropped=True,
        duplicate_ids=17,
        top=[
            DuplicateText(
                count=311, bytes=4_096, id="crawl/17/4", excerpt="All rights reserved. " * 6
            ),
            DuplicateText(count=12, bytes=77, id=ADVERSARIAL, excerpt=ADVERSARIAL),
        ],
    )


def _throughput() -> Throughput:
    return Throughput(
        workers=8,
        wall_seconds=212.0,
        cpu_seconds=1_650.0,
        bytes=900_000_000,
        input_bytes=240_000_000,
        tokens=230_000_000,
        stage_seconds={
            "read": 60.0,
            "tokenize": 1_420.0,
            "pack": 12.0,
            "write": 130.0,
            "other": 28.0,
        },
    )


def _tokenizer() -> TokenizerReport:
    return TokenizerReport(
        name="bpe-32k",
        kind="byte-level BPE",
        vocab_size=32_768,
        sha256="cd34" * 16,
        encoder="tiktoken",
        reason=(
            "equal to the tokenizers library on 1,024 documents and the fixed set of hard ones"
        ),
    )


def empty_report() -> PrepReport:
    """Nothing read, nothing kept, no time spent."""
    nothing = SplitReport(
        split="train",
        domain="code",
        documents=0,
        bytes=0,
        tokens=0,
        text_tokens=0,
        sequences=0,
        slots=0,
        padding_tokens=0,
        pieces=0,
        cut_documents=0,
        length_histogram=[],
    )
    return rich_report().model_copy(
        update={
            "documents_read": 0,
            "splits": [nothing],
            "filtered": {},
            "quarantined": {},
            "inputs": [],
            "duplicates": Duplicates(documents=0, bytes=0, dropped=False, top=[], duplicate_ids=0),
            "throughput": Throughput(
                workers=1,
                wall_seconds=0.0,
                cpu_seconds=0.0,
                bytes=0,
                input_bytes=0,
                tokens=0,
                stage_seconds={},
            ),
        }
    )
