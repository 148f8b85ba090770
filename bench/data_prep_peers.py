"""Tokenization of other programs, rewritten in a few lines each, beside `nextpt prep`.

    python -m bench.data_prep_peers NAME CORPUS.jsonl.zst TOKENIZER.json FOLDER

Prints one line of JSON.

Each copy keeps what takes time: the encoding call of the library and its batch size, the Python
work on the tokens, and the output format. The omissions favour the peers: all three read the .zst
file the way nextpt does (two of them cannot read it at all), and no pool of processes pickles
documents and tokens. Run one per process, with RAYON_NUM_THREADS=1 for
figures per core.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa

END = "<|endoftext|>"


def lines(corpus: Path) -> Iterator[bytes]:
    """Read the lines of a .jsonl, .gz or .zst."""
    rest = b""
    with pa.input_stream(str(corpus), compression="detect") as stream:
        while chunk := stream.read(2**22):
            *whole, rest = (rest + chunk).split(b"\n")
            yield from whole
    if rest:
        yield rest


def llm_foundry(corpus: Path, tokenizer_json: Path, folder: Path, max_length: int = 2048) -> int:
    """Tokenize as llm-foundry v0.22's convert_dataset_json --concat_tokens.

    (llmfoundry/command_utils/data_prep/convert_dataset_json.py and ConcatTokensDataset of
    llmfoundry/data/data.py.) transformers' fast tokenizer, one document at a time; a Python list
    that rows are cut from; rows of int32 through MDSWriter. The tokens after the last full row are
    dropped.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import PreTrainedTokenizerFast

    from data_prep.streaming_compat import import_streaming

    import_streaming()
    from streaming import MDSWriter

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_json), eos_token=END, model_max_length=int(1e30)
    )
    end = tokenizer(END, truncation=False, padding=False, add_special_tokens=False)["input_ids"]
    count, buffer = 0, []
    with MDSWriter(columns={"tokens": "ndarray:int32"}, out=str(folder)) as writer:
        for line in lines(corpus):
            ids = tokenizer(orjson.loads(line)["text"], truncation=False, padding=False)[
                "input_ids"
            ]
            buffer = buffer + ids + end  # a new list each time, as theirs
            while len(buffer) >= max_length:
                row, buffer = buffer[:max_length], buffer[max_length:]
                writer.write({"tokens": np.asarray(row, dtype=np.int32)})
                count += max_length
    return count


def datatrove(corpus: Path, tokenizer_json: Path, folder: Path, batch_size: int = 10_000) -> int:
    """Tokenize as datatrove 0.10.1's DocumentTokenizer with its defaults.

    (src/datatrove/pipeline/tokens/tokenizer.py.) encode_batch of 10,000 documents, the end by a
    TemplateProcessing, struct.pack of each document's list, then all documents copied once more in
    shuffled order; beside the tokens their ends as uint64.
    """
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    tokenizer.post_processor = TemplateProcessing(
        single="$A <EOS>", special_tokens=[("<EOS>", tokenizer.token_to_id(END))], pair=None
    )
    size, code = (4, "I") if tokenizer.get_vocab_size() > 2**16 else (2, "H")
    folder.mkdir(parents=True, exist_ok=True)
    ends, total = [], 0
    unshuffled = folder / "00000_unshuffled.ds"
    documents = (orjson.loads(line)["text"] for line in lines(corpus))
    with open(unshuffled, "wb") as file:
        while batch := list(islice(documents, batch_size)):
            for encoded in tokenizer.encode_batch(batch):
                ids = encoded.ids
                file.write(struct.pack(f"<{len(ids)}{code}", *ids))
                total += len(ids)
                ends.append(total)
    starts, order = [0, *ends], np.random.default_rng(0).permutation(len(ends)).tolist()
    with (
        open(unshuffled, "rb") as source,
        open(folder / "00000_00000_doc_shuffled.ds", "wb") as file,
    ):
        for document in order:
            source.seek(starts[document] * size)
            file.write(source.read((starts[document + 1] - starts[document]) * size))
    lengths = np.diff(starts)[order]
    (folder / "00000_00000_doc_shuffled.ds.index").write_bytes(
        np.cumsum(lengths).astype("<u8").tobytes()
    )
    unshuffled.unlink()
    return total


def megatron(corpus: Path, tokenizer_json: Path, folder: Path) -> int:
    """Tokenize as Megatron-LM's tools/preprocess_data.py --append-eod with one worker.

    (And IndexedDatasetBuilder of megatron-core 0.16.1.) json.loads and `encode` of one document at
    a time, an array of its tokens to .bin, Python lists of lengths to .idx. Through the tokenizers
    library itself; Megatron's own wrapper goes through transformers.
    """
    from tokenizers import Tokenizer

    from data_prep.export import CODES, HEADER, MAGIC, megatron_dtype

    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    end, dtype = tokenizer.token_to_id(END), megatron_dtype(tokenizer.get_vocab_size())
    folder.mkdir(parents=True, exist_ok=True)
    lengths: list[int] = []
    with open(folder / "corpus_text_document.bin", "wb") as file:
        for line in lines(corpus):
            ids = tokenizer.encode(json.loads(line)["text"]).ids
            if ids:
                ids.append(end)
                file.write(np.array(ids, dtype=dtype).tobytes())
                lengths.append(len(ids))
    offsets = np.concatenate(([0], np.cumsum(lengths)))[:-1] * dtype.itemsize
    header = HEADER.pack(
        MAGIC, 1, CODES["uint16" if dtype.kind == "u" else "int32"], len(lengths), len(lengths) + 1
    )
    tables = (
        np.array(lengths, "<i4"),
        offsets.astype("<i8"),
        np.arange(len(lengths) + 1, dtype="<i8"),
    )
    (folder / "corpus_text_document.idx").write_bytes(
        b"".join([header, *(table.tobytes() for table in tables)])
    )
    return sum(lengths)


PEERS: dict[str, Callable[[Path, Path, Path], int]] = {
    "llm-foundry": llm_foundry,
    "datatrove": datatrove,
    "megatron": megatron,
}


def main() -> None:
    """Run a program and print its tokens."""
    name, corpus, tokenizer, folder = sys.argv[1:]
    started = time.perf_counter(), sum(os.times()[:4])
    tokens = PEERS[name](Path(corpus), Path(tokenizer), Path(folder))
    print(
        json.dumps(
            {
                "peer": name,
                "tokens": tokens,
                "seconds": time.perf_counter() - started[0],
                "cpu_seconds": sum(os.times()[:4]) - started[1],
            }
        )
    )


if __name__ == "__main__":
    main()
