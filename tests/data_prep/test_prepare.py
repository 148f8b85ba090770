"""From corpora to shards: nothing lost, everything reproducible, user errors named."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.documents import read_documents
from data_prep.format import PADDING, DatasetManifest, token_dtype
from data_prep.pack import best_fit_decreasing, pack
from data_prep.prepare import prepare, quarantine_summary
from data_prep.spec import PrepSpec
from data_prep.stdlib_corpus import collect
from data_prep.streaming_compat import import_streaming
from data_prep.tokenizer import Tokenizer, train_bpe
from nextpt.base.errors import DataPrepError
from tests.support.prep_worlds import lines_of

TEXTS = [
    f"line {i}: the quick brown fox jumps over {i * 7919} lazy dogs, again and again\n"
    * (1 + i % 9)
    for i in range(60)
]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text(
        "".join(json.dumps({"id": str(i), "text": t}) + "\n" for i, t in enumerate(texts)),
        encoding="utf-8",
    )
    return path


def spec(tmp_path: Path, texts: list[str] = TEXTS, **changes: object) -> PrepSpec:
    values: dict[str, object] = {
        "domains": {"a": write(tmp_path / "a.jsonl", texts)},
        "output": tmp_path / "out",
        "sequence_length": 16,
        "vocab_size": 300,
        "validation_fraction": 0.2,
    }
    return PrepSpec(**(values | changes))


@pytest.mark.thorough
@given(
    st.lists(st.integers(2, 200), max_size=20),
    st.integers(3, 40),
    st.sampled_from(["best_fit", "concat", "single"]),
)
def test_every_packing_predicts_each_token_once(
    lengths: list[int], capacity: int, method: str
) -> None:
    pieces, rows = pack(np.array(lengths, dtype=np.int64), capacity, method)
    placed = list(
        zip(pieces.document.tolist(), pieces.start.tolist(), pieces.stop.tolist(), strict=True)
    )
    assert sorted(i for row in rows for i in row) == list(range(len(placed)))
    assert all(0 < sum(pieces.lengths[i] for i in row) <= capacity for row in rows)
    targets = [(document, t) for document, start, stop in placed for t in range(start + 1, stop)]
    assert sorted(targets) == [
        (document, t) for document, length in enumerate(lengths) for t in range(1, length)
    ]


@given(st.lists(st.integers(2, 17), max_size=80))
def test_packing_places_every_piece_once(lengths: list[int]) -> None:
    rows = best_fit_decreasing(np.array(lengths, dtype=np.int64), 17)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 17 for row in rows)
    fullness = sorted(sum(lengths[i] for i in row) for row in rows)
    # Best fit never leaves two sequences that fit in one
    assert len(fullness) < 2 or fullness[0] + fullness[1] > 17


def test_packing_refuses_pieces_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="longer than a sequence"):
        best_fit_decreasing(np.array([18]), 17)


@pytest.mark.thorough
def test_sequences_decode_to_the_documents(tmp_path: Path) -> None:
    s = spec(tmp_path)
    manifest = prepare(s)
    tokenizer = Tokenizer(tmp_path / "out" / "tokenizer.json")
    import_streaming()
    from streaming.base.format import reader_from_json

    pieces: list[str] = []
    for split in ("train", "validation"):
        folder = tmp_path / "out" / split / "a"
        index = json.loads((folder / "index.json").read_text())
        size = 0
        for shard in index["shards"]:
            reader = reader_from_json(str(folder), None, shard)
            for i in range(shard["samples"]):
                row = reader[i]
                assert row["tokens"].shape == (17,) and row["tokens"].dtype == np.uint16
                assert int(row["doc_lens"].sum()) == 17
                size += int(row["text_bytes"])
                starts = np.cumsum(row["doc_lens"]) - row["doc_lens"]
                for start, length, flag in zip(
                    starts, row["doc_lens"], row["doc_flags"], strict=True
                ):
                    if not flag & PADDING:
                        pieces.append(
                            tokenizer.decode(row["tokens"][int(start) : int(start + length)][1:])
                        )
        counts = manifest.splits[split]["a"]
        assert size == counts.bytes and counts.sequences == sum(
            s["samples"] for s in index["shards"]
        )
    assert manifest.splits["train"]["a"].documents + manifest.splits["validation"][
        "a"
    ].documents == len(TEXTS)
    assert sum(map(len, pieces)) == sum(map(len, TEXTS))
    heldout = [
        json.loads(line)["text"]
        for line in lines_of(tmp_path / "out" / "validation_text" / "a.jsonl")
    ]
    assert 0 < len(heldout) == manifest.splits["validation"]["a"].documents and set(heldout) <= set(
        TEXTS
    )


@pytest.mark.thorough
def test_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    first = prepare(spec(tmp_path))
    second = prepare(spec(tmp_path, output=tmp_path / "again"))
    assert first == second
    for path in (p for p in (tmp_path / "out").rglob("*") if p.is_file() and p.stem != "report"):
        assert (
            path.read_bytes()
            == (tmp_path / "again" / path.relative_to(tmp_path / "out")).read_bytes()
        ), path


@pytest.mark.thorough
def test_a_document_keeps_its_side_when_the_corpus_grows(tmp_path: Path) -> None:
    prepare(spec(tmp_path, TEXTS[:40]))
    few = (tmp_path / "out" / "validation_text" / "a.jsonl").read_text()
    prepare(spec(tmp_path, TEXTS), overwrite=True)
    many = (tmp_path / "out" / "validation_text" / "a.jsonl").read_text()
    assert many.startswith(few) and few


@pytest.mark.thorough
def test_reuse_and_refusal(tmp_path: Path) -> None:
    manifest = prepare(spec(tmp_path))
    stamp = (tmp_path / "out" / "dataset.json").stat().st_mtime_ns
    assert prepare(spec(tmp_path)) == manifest
    assert (tmp_path / "out" / "dataset.json").stat().st_mtime_ns == stamp
    with pytest.raises(DataPrepError, match="--overwrite"):
        prepare(spec(tmp_path, sequence_length=32))
    assert DatasetManifest.load(tmp_path / "out") == manifest
    assert prepare(spec(tmp_path, sequence_length=32), overwrite=True).sequence_length == 32


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(TEXTS, 300, path)
    return Tokenizer(path)


@pytest.mark.thorough
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=150,
)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_unicode_text_survives_and_its_bytes_are_counted(
    tokenizer: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode())


def test_text_that_spells_a_special_token_stays_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.end_id not in ids.tolist() and tokenizer.decode(ids) == "a<|endoftext|>b"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": \n',
            ["a.jsonl, byte 14", "not a JSON object", "1 of 2 records"],
        ),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', ["a.jsonl, byte 14", "no text", "'text'"]),
        ("a.jsonl", b'{"text": "\xff"}\n', ["a.jsonl, byte 0", "not UTF-8"]),
        ("a.txt", b"fine\xfe", ["a.txt, byte 0", "byte 4 of it"]),
        ("a.parquet", b"PAR1 no", ["a.parquet", "Parquet"]),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-9],
            ["a.jsonl.gz", "Truncated"],
        ),
        ("a.csv", b"x", ["expected", ".jsonl"]),
        ("a.jsonl", b"", ["domain d", "no document to train on"]),
    ],
)
def test_bad_corpora_are_named_and_nothing_takes_the_output_s_name(
    tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    # with a tokenizer of its own an empty corpus gets as far as the split
    train_bpe(TEXTS, 300, tmp_path / "given.json")
    with pytest.raises(DataPrepError) as raised:
        prepare(
            PrepSpec(
                domains={"d": tmp_path / name},
                output=tmp_path / "out",
                sequence_length=16,
                tokenizer=tmp_path / "given.json",
            )
        )
    assert all(word in str(raised.value) for word in words) and "\n" not in str(raised.value)
    assert {p.name for p in tmp_path.iterdir()} <= {name, "given.json", "out.work"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 100}, "too small"),
        ({"vocab_size": 100_000}, "the texts give only"),
        ({"vocab_size": 2**33}, "does not fit uint32"),
        ({"validation_fraction": 1.5}, "validation_fraction = 1.5"),
        ({"split": "head"}, "split = 'head'"),
        ({"characters": True}, "give one of vocab_size"),
        ({"sequence_length": 1}, "sequence_length = 1"),
        ({"vocab_size": None}, "give one of"),
        ({"domains": {"a/b": Path("/")}}, "domain name 'a/b'"),
        ({"domains": {"a": Path("/nowhere")}}, "/nowhere does not exist"),
        ({"vocab_size": None, "tokenizer": Path("/nowhere.json")}, "nowhere.json"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises((DataPrepError, OSError), match=message.replace(".", r"\.")):
        prepare(spec(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"vocab_size": 300}, {"vocab_size": None, "characters": True}])
def test_a_wrong_text_key_is_named_before_a_tokenizer_is_trained(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    with pytest.raises(
        DataPrepError,
        match=r"records are bad; the first: .*under key 'body'; its keys are .*'text'",
    ):
        prepare(spec(tmp_path, **changes, text_field="body"))


def test_quarantined_records_are_counted_by_reason(tmp_path: Path) -> None:
    assert quarantine_summary(tmp_path) == "quarantined records: 0"
    (tmp_path / "quarantine.jsonl").write_text('{"reason": "a"}\n{"reason": "b"}\n' * 2)
    summary = quarantine_summary(tmp_path)
    assert summary == f"quarantined records: 4 (a: 2, b: 2); see {tmp_path}/quarantine.jsonl"


def test_all_formats_read_the_same(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = write(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    with pa.output_stream(str(tmp_path / "a.jsonl.zst"), compression="zstd") as stream:
        stream.write(plain.read_bytes())
    pq.write_table(
        pa.table({"id": [str(i) for i in range(len(TEXTS))], "text": TEXTS}), tmp_path / "a.parquet"
    )
    expected = list(read_documents(plain))
    assert [d.text for d in expected] == TEXTS
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        assert list(read_documents(tmp_path / name)) == expected, name


def test_token_type_fits_the_vocabulary() -> None:
    assert token_dtype(2**16) == np.uint16 and token_dtype(2**16 + 1) == np.uint32


def test_stdlib_corpus_separates_docstrings_from_code(tmp_path: Path) -> None:
    library = tmp_path / "lib"
    library.mkdir()
    doc = "Words about the module. " * 12
    (library / "m.py").write_text(
        f'"""{doc}"""\n\n\ndef f(x):\n    """Say it."""\n    return x  # kept\n\n\nclass C:\n   '
        ' """Only words."""\n'
    )
    (library / "broken.py").write_text("def (:\n")
    counts = collect(tmp_path / "out", library)
    code = [json.loads(line) for line in lines_of(tmp_path / "out" / "code.jsonl")]
    prose = [json.loads(line) for line in lines_of(tmp_path / "out" / "prose.jsonl")]
    assert counts.documents == {"code": 1, "prose": 1} and counts.skipped == 1
    assert (
        code[0]["id"] == "m.py"
        and "return x  # kept" in code[0]["text"]
        and "Words" not in code[0]["text"]
    )
    compile(code[0]["text"], "m.py", "exec")
    assert "Say it." in prose[0]["text"] and "Only words." in prose[0]["text"]


@pytest.mark.process
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        job = spec(tmp_path, TEXTS * 40, output=disk / "out")
        with pytest.raises(DataPrepError, match="no space left"):
            prepare(job)
        assert not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        prepare(job)
        assert [p.name for p in disk.iterdir()] == ["out"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.thorough
def test_characters_as_tokens_and_the_tail_held_out(tmp_path: Path) -> None:
    """One long text: the last share is held out, every character is one token."""
    text = "".join(
        f"{i}: to be or not to be, that is the question \u2014 \u00e9\n" for i in range(200)
    )
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    manifest = prepare(
        spec(
            tmp_path,
            domains={"a": tmp_path / "one.txt"},
            vocab_size=None,
            characters=True,
            split="tail",
            validation_fraction=0.1,
        )
    )
    boundary = int(len(text) * 0.9)
    counts = {split: manifest.splits[split]["a"] for split in ("train", "validation")}
    assert (
        counts["train"].text_tokens == boundary
        and counts["validation"].text_tokens == len(text) - boundary
    )
    assert (
        counts["train"].bytes == len(text[:boundary].encode())
        and manifest.vocab_size == len(set(text)) + 1
    )
    tokenizer = Tokenizer(tmp_path / "out" / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode(text)) == text and len(tokenizer.encode(text)) == len(
        text
    )
    heldout = [
        json.loads(line)["text"]
        for line in lines_of(tmp_path / "out" / "validation_text" / "a.jsonl")
    ]
    assert heldout == [text[boundary:]]
    with pytest.raises(DataPrepError, match="refuses a text"):
        tokenizer.encode("Z")


@pytest.mark.thorough
def test_the_tail_of_many_documents_is_cut_once(tmp_path: Path) -> None:
    manifest = prepare(spec(tmp_path, split="tail", validation_fraction=0.3))
    tail = "".join(
        json.loads(line)["text"]
        for line in lines_of(tmp_path / "out" / "validation_text" / "a.jsonl")
    )
    assert "".join(TEXTS).endswith(tail) and len(tail) == len("".join(TEXTS)) - int(
        len("".join(TEXTS)) * 0.7
    )
    assert manifest.splits["train"]["a"].bytes + len(tail) == len("".join(TEXTS))
    assert sum(manifest.splits[s]["a"].documents for s in ("train", "validation")) in (
        len(TEXTS),
        len(TEXTS) + 1,
    )
