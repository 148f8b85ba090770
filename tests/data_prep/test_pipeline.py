"""Datasets hold every record exactly once, with every packing and tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.duplicates import KEYED, _later
from data_prep.format import (
    ENDS_MID_DOCUMENT,
    PADDING,
    SPLITS,
    STARTS_MID_DOCUMENT,
    DatasetManifest,
)
from data_prep.prepare import is_current
from data_prep.spec import PrepSpec
from data_prep.streaming_compat import import_streaming
from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import DataPrepError
from nextpt.base.files import sha256_file
from tests.support.prep_worlds import lines_of, prepare, small_units, texts, world, write_lines
from tests.support.tokenizers import ANY_TEXT, KINDS


def read_sequences(dataset: Path, split: str, domain: str) -> list[dict[str, Any]]:
    """Sequences as mosaicml-streaming's own reader returns them."""
    import_streaming()
    from streaming.base.format import reader_from_json

    index = dataset / split / domain / "index.json"
    if not index.exists():
        return []
    sequences = []
    for shard in json.loads(index.read_text())["shards"]:
        if shard["zip_data"]:
            import zstandard

            path = dataset / split / domain / shard["zip_data"]["basename"]
            (dataset / split / domain / shard["raw_data"]["basename"]).write_bytes(
                zstandard.decompress(path.read_bytes(), shard["raw_data"]["bytes"])
            )
        reader = reader_from_json(str(dataset / split / domain), None, shard)
        sequences += [reader[i] for i in range(shard["samples"])]
    return sequences


def segments(sequences: list[dict[str, Any]]) -> list[tuple[np.ndarray, int]]:
    """(tokens, flags) of all segments except padding."""
    parts = []
    for sequence in sequences:
        ends = np.cumsum(sequence["doc_lens"]).tolist()
        for end, length, flags in zip(
            ends, sequence["doc_lens"].tolist(), sequence["doc_flags"].tolist(), strict=True
        ):
            if not flags & PADDING:
                parts.append((sequence["tokens"][end - length : end], flags))
    return parts


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PrepSpec:
    spec = world(tmp_path_factory.mktemp("world"))
    with small_units():
        prepare(spec)
    return spec


def expected_texts(spec: PrepSpec, domain: str) -> list[str]:
    files = sorted(Path(spec.domains[domain]).rglob("*.jsonl")) or [Path(spec.domains[domain])]
    return [json.loads(line)["text"] for file in files for line in lines_of(file)]


@pytest.mark.thorough
@pytest.mark.parametrize("packing", ["best_fit", "concat", "single"])
@pytest.mark.parametrize("compression", [None, "zstd:3"])
def test_sequences_hold_every_document_once(
    prepared: PrepSpec, tmp_path: Path, packing: str, compression: str | None
) -> None:
    spec = prepared.model_copy(
        update={"output": tmp_path / "out", "packing": packing, "compression": compression}
    )
    with small_units():
        manifest = prepare(spec)
    tokenizer = Tokenizer(spec.output / "tokenizer.json")
    for domain in ("a", "b"):
        whole: Counter[str] = Counter()
        tokens = size = 0
        for split in SPLITS:
            sequences = read_sequences(spec.output, split, domain)
            counts = manifest.splits[split][domain]
            assert (
                len(sequences) == counts.sequences
                and sum(int(r["text_bytes"]) for r in sequences) == counts.bytes
            )
            documents = segments(sequences)
            assert sum(len(t) - 1 for t, _ in documents) == counts.tokens
            assert len(sequences) * 65 - sum(len(t) for t, _ in documents) == counts.padding_tokens
            inner = STARTS_MID_DOCUMENT | ENDS_MID_DOCUMENT
            assert all(
                (t[0] == tokenizer.start_id) == (not f & STARTS_MID_DOCUMENT) for t, f in documents
            )
            assert all(
                (t[-1] == tokenizer.end_id) == (not f & ENDS_MID_DOCUMENT) for t, f in documents
            )
            whole.update(tokenizer.decode(t) for t, f in documents if not f & inner)
            tokens += counts.tokens
            size += counts.bytes
        expected = expected_texts(spec, domain)
        assert size == sum(len(text.encode()) for text in expected)
        assert tokens == sum(len(tokenizer.encode(text)) + 1 for text in expected)
        short = Counter(text for text in expected if whole[text])
        assert whole == short and len(whole) > (0 if packing == "concat" else 10)
    if packing == "concat":
        assert all(
            manifest.splits[s][d].padding_tokens <= 66 * 9 for s in SPLITS for d in ("a", "b")
        )


def test_the_index_of_a_domain_lists_shards_in_folders(prepared: PrepSpec) -> None:
    index = json.loads((prepared.output / "train/a/index.json").read_text())
    names = [shard["raw_data"]["basename"] for shard in index["shards"]]
    assert (
        len(names) > 1
        and all(name.startswith("g0") and "/" in name for name in names)
        and len(set(names)) == len(names)
    )
    manifest = DatasetManifest.load(prepared.output)
    assert manifest.splits["train"]["a"].index_sha256 == sha256_file(
        prepared.output / "train/a/index.json"
    )


@pytest.mark.thorough
def test_units_and_groups_change_neither_sides_nor_counts(
    prepared: PrepSpec, tmp_path: Path
) -> None:
    """Groups change how sequences are filled, not what documents they hold."""
    spec = prepared.model_copy(update={"output": tmp_path / "out"})
    single, many = prepare(spec), DatasetManifest.load(prepared.output)
    for split in SPLITS:
        for domain in ("a", "b"):
            a, b = single.splits[split][domain], many.splits[split][domain]
            assert (a.documents, a.bytes, a.tokens, a.text_tokens) == (
                b.documents,
                b.bytes,
                b.tokens,
                b.text_tokens,
            )
        assert (spec.output / "validation_text/a.jsonl").read_bytes() == (
            prepared.output / "validation_text/a.jsonl"
        ).read_bytes()


@pytest.mark.thorough
def test_a_unit_larger_than_a_group_is_divided_by_documents(
    prepared: PrepSpec, tmp_path: Path
) -> None:
    spec = prepared.model_copy(update={"output": tmp_path / "out"})
    with small_units(10**9, 3000):
        manifest = prepare(spec)
    groups = {
        domain: sorted(p.name for p in (spec.output / "train" / domain).glob("g*"))
        for domain in ("a", "b")
    }
    tokens = {
        domain: sum(
            manifest.splits[s][domain].tokens + manifest.splits[s][domain].documents for s in SPLITS
        )
        for domain in groups
    }
    # No document has above 1000 tokens
    assert all(tokens[d] / 3000 <= len(groups[d]) <= 1 + tokens[d] / 2000 for d in groups)
    before = DatasetManifest.load(prepared.output)
    for split in SPLITS:
        for domain in groups:
            a, b = manifest.splits[split][domain], before.splits[split][domain]
            assert (a.documents, a.bytes, a.tokens, a.text_tokens) == (
                b.documents,
                b.bytes,
                b.tokens,
                b.text_tokens,
            )


def test_texts_are_equal_when_hash_and_length_are() -> None:
    keyed = np.array(
        [(7, 5, 0, 0), (7, 6, 0, 1), (7, 5, 0, 2), (7, 6, 1, 0), (8, 5, 1, 1), (7, 5, 2, 0)],
        dtype=KEYED,
    )
    later, often = _later(keyed)
    assert later.tolist() == [(0, 2), (1, 0), (2, 0)] and often.tolist() == [
        (3, 5, 0, 0),
        (2, 6, 0, 1),
    ]


@pytest.mark.thorough
def test_tokens_that_omit_text_are_detected(
    prepared: PrepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No known tokenizer does this; the sum is checked nevertheless."""
    encode = Tokenizer.encode_batch

    def forgetful(self: Tokenizer, texts: list[str]) -> list[np.ndarray]:
        return [
            ids[:-1] if "queen" in text else ids
            for ids, text in zip(encode(self, texts), texts, strict=True)
        ]

    monkeypatch.setattr(Tokenizer, "encode_batch", forgetful)
    write_lines(tmp_path / "x.jsonl", ["plain", "a queen", "more", "and more"])
    spec = prepared.model_copy(
        update={
            "output": tmp_path / "out",
            "domains": {"x": tmp_path / "x.jsonl"},
            "max_bad_fraction": 0.5,
            "validation_fraction": 0.0,
        }
    )
    assert prepare(spec).splits["train"]["x"].documents == 3
    assert "the tokenizer changes it" in (spec.output / "quarantine.jsonl").read_text()


@pytest.mark.thorough
def test_duplicates_are_counted_and_dropped_if_configured(
    prepared: PrepSpec, tmp_path: Path
) -> None:
    base = texts(40, 9)
    write_lines(tmp_path / "x/1.jsonl", base + base[:7])
    write_lines(tmp_path / "x/2.jsonl", base[5:9] + texts(5, 10))
    spec = prepared.model_copy(
        update={"output": tmp_path / "out", "domains": {"x": tmp_path / "x"}}
    )
    with small_units(2000):
        with_duplicates = prepare(spec)
    report = json.loads((spec.output / "report.json").read_text())
    assert sum(with_duplicates.splits[s]["x"].documents for s in SPLITS) == 56
    assert report["duplicates"]["documents"] == 11 and report["duplicates"]["bytes"] == sum(
        len(t.encode()) for t in base[:7] + base[5:9]
    )
    assert [t["count"] for t in report["duplicates"]["top"]] == [3, 3, *[2] * 7]
    with small_units(2000):
        dropped = prepare(
            spec.model_copy(update={"output": tmp_path / "dropped", "duplicates": "drop"})
        )
    assert sum(dropped.splits[s]["x"].documents for s in SPLITS) == 45
    copies = Counter(
        json.loads(line)["text"] for line in lines_of(tmp_path / "dropped/validation_text/x.jsonl")
    )
    assert set(copies.values()) == {1}
    assert json.loads((tmp_path / "dropped/report.json").read_text())["filtered"] == {
        "repeats an earlier text": 11
    }


@pytest.mark.thorough
def test_duplicates_never_straddle_the_split(prepared: PrepSpec, tmp_path: Path) -> None:
    write_lines(tmp_path / "x.jsonl", texts(30, 4) * 3)
    spec = prepared.model_copy(
        update={"output": tmp_path / "out", "domains": {"x": tmp_path / "x.jsonl"}}
    )
    prepare(spec)
    heldout = Counter(
        json.loads(line)["text"] for line in lines_of(spec.output / "validation_text/x.jsonl")
    )
    assert heldout and set(heldout.values()) == {3}


@pytest.mark.thorough
def test_a_repeated_id_is_quarantined_and_a_repeated_record_is_not(
    prepared: PrepSpec, tmp_path: Path
) -> None:
    contents = texts(20, 5)
    records = [{"id": i, "text": t} for i, t in enumerate(contents)] + [
        {"id": 3, "text": "another text"},
        {"id": 4, "text": contents[4]},
        {"text": "none"},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    spec = prepared.model_copy(
        update={"output": tmp_path / "out", "domains": {"x": tmp_path / "x.jsonl"}}
    )
    with pytest.raises(DataPrepError, match=r"1 of 23 records are bad.*repeated id: 1.*--id-field"):
        prepare(spec)
    manifest = prepare(spec.model_copy(update={"max_bad_fraction": 0.1}), overwrite=True)
    assert sum(manifest.splits[s]["x"].documents for s in SPLITS) == 22
    entry = json.loads((spec.output / "quarantine.jsonl").read_text())
    line = (tmp_path / "x.jsonl").read_bytes()[entry["position"] :].split(b"\n")[0]
    assert json.loads(line)["text"] == "another text" and entry["reason"] == "repeated id"
    manifest = prepare(spec.model_copy(update={"id_field": None}), overwrite=True)
    assert sum(manifest.splits[s]["x"].documents for s in SPLITS) == 23


@pytest.mark.thorough
def test_bad_records_are_quarantined_up_to_the_stated_share(
    prepared: PrepSpec, tmp_path: Path
) -> None:
    good = texts(97, 6)
    write_lines(tmp_path / "x.jsonl", good)
    with open(tmp_path / "x.jsonl", "ab") as file:
        file.write(b'{"text": 5}\n{"text": "\xff"}\n{"id": "e", "text": ""}\nno\n')
    spec = prepared.model_copy(
        update={
            "output": tmp_path / "out",
            "domains": {"x": tmp_path / "x.jsonl"},
            "max_bad_fraction": 0.02,
        }
    )
    with pytest.raises(
        DataPrepError, match=r"3 of 101 records are bad, more than max_bad_fraction = 0.02"
    ):
        prepare(spec)
    assert (
        len((spec.work / "quarantine.jsonl").read_text().splitlines()) == 3
        and not spec.output.exists()
    )
    spec = spec.model_copy(update={"max_bad_fraction": 0.03})
    manifest = prepare(spec, overwrite=True)
    assert sum(manifest.splits[s]["x"].documents for s in SPLITS) == 97
    report = json.loads((spec.output / "report.json").read_text())
    assert report["filtered"] == {"empty": 1} and report["documents_read"] == 101
    assert {reason: q["records"] for reason, q in report["quarantined"].items()} == {
        "text is no string": 1,
        "not UTF-8": 1,
        "not a JSON object": 1,
    }
    assert [json.loads(line)["reason"] for line in lines_of(spec.output / "quarantine.jsonl")] == [
        "text is no string",
        "not UTF-8",
        "not a JSON object",
    ]


@pytest.mark.thorough
def test_length_bounds(prepared: PrepSpec, tmp_path: Path) -> None:
    write_lines(tmp_path / "x.jsonl", ["é" * n for n in range(1, 41)])
    spec = prepared.model_copy(
        update={
            "output": tmp_path / "out",
            "domains": {"x": tmp_path / "x.jsonl"},
            "min_bytes": 5,
            "max_bytes": 60,
        }
    )
    manifest = prepare(spec)
    assert sum(manifest.splits[s]["x"].documents for s in SPLITS) == 28
    assert json.loads((spec.output / "report.json").read_text())["filtered"] == {
        "shorter than min_bytes": 2,
        "longer than max_bytes": 10,
    }


@pytest.mark.thorough
def test_domains_out_of_the_records(prepared: PrepSpec, tmp_path: Path) -> None:
    for name in ("de", "en", "fr"):
        write_lines(
            tmp_path / f"{name}.jsonl", texts(40, len(name) + ord(name[0])), meta={"lang": name}
        )
    lines = [(tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("de", "en", "fr")]
    (tmp_path / "x").mkdir()
    (tmp_path / "x/mixed.jsonl").write_text(
        "".join(line + "\n" for group in zip(*lines, strict=True) for line in group)
        + '{"text": "x", "meta": {"lang": "../up"}}\n'
    )
    spec = prepared.model_copy(
        update={
            "output": tmp_path / "out",
            "domains": {"web": tmp_path / "x"},
            "domain_field": "meta.lang",
            "max_bad_fraction": 0.01,
        }
    )
    with small_units(3000, 2000):
        manifest = prepare(spec)
    assert manifest.domains == ["de", "en", "fr"]
    tokenizer = Tokenizer(spec.output / "tokenizer.json")
    for name, group in zip(manifest.domains, lines, strict=True):
        expected = {json.loads(line)["text"] for line in group}
        assert sum(manifest.splits[s][name].documents for s in SPLITS) == 40
        whole = {
            tokenizer.decode(t)
            for s in SPLITS
            for t, f in segments(read_sequences(spec.output, s, name))
            if not f & 3
        }
        assert whole and whole <= expected
        assert {int(r["domain"]) for s in SPLITS for r in read_sequences(spec.output, s, name)} == {
            manifest.domains.index(name)
        }


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind in ANY_TEXT:
        KINDS[kind](folder / f"{kind}.json")
    return {kind: folder / f"{kind}.json" for kind in ANY_TEXT}


@pytest.mark.thorough
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=200), min_size=1, max_size=12
    ),
    st.sampled_from(ANY_TEXT),
    st.sampled_from(["best_fit", "concat", "single"]),
    st.integers(2, 40),
)
def test_the_bytes_of_predicted_tokens_are_those_of_the_texts(
    prepared: PrepSpec,
    tokenizers: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    contents: list[str],
    kind: str,
    packing: str,
    length: int,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    write_lines(folder / "x.jsonl", [*contents, "one more"])
    spec = prepared.model_copy(
        update={
            "output": folder / "out",
            "domains": {"x": folder / "x.jsonl"},
            "packing": packing,
            "sequence_length": length,
            "validation_fraction": 0.0,
            "tokenizer": tokenizers[kind],
        }
    )
    manifest = prepare(spec)
    sequences = read_sequences(spec.output, "train", "x")
    assert (
        sum(int(r["text_bytes"]) for r in sequences)
        == manifest.splits["train"]["x"].bytes
        == sum(len(t.encode()) for t in [*contents, "one more"])
    )
    assert manifest.splits["train"]["x"].documents == 1 + sum(map(bool, contents))
    for sequence in sequences if manifest.byte_counts == "column" else ():
        assert (
            sequence["target_bytes"].sum() == sequence["text_bytes"]
            and sequence["target_bytes"][0] == 0
        )


@pytest.mark.thorough
def test_a_changed_corpus_or_setting_is_detected(prepared: PrepSpec, tmp_path: Path) -> None:
    write_lines(tmp_path / "x.jsonl", texts(30, 8))
    spec = prepared.model_copy(
        update={"output": tmp_path / "out", "domains": {"x": tmp_path / "x.jsonl"}}
    )
    prepare(spec)
    assert is_current(spec) and not is_current(spec.model_copy(update={"seed": 1}))
    write_lines(tmp_path / "x.jsonl", texts(31, 8))
    assert not is_current(spec)
    with pytest.raises(DataPrepError, match=r"other inputs or settings.*--overwrite"):
        prepare(spec)
    old = (spec.output / "dataset.json").read_bytes()
    assert (
        prepare(spec, overwrite=True).splits["train"]["x"].documents
        and (spec.output / "dataset.json").read_bytes() != old
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "x.jsonl"]


@pytest.mark.thorough
def test_unfinished_work_on_other_inputs_is_kept(prepared: PrepSpec, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("no\n")
    spec = prepared.model_copy(
        update={"output": tmp_path / "out", "domains": {"x": tmp_path / "x.jsonl"}}
    )
    with pytest.raises(DataPrepError, match="records are bad"):
        prepare(spec)
    write_lines(tmp_path / "x.jsonl", texts(30, 8))
    with pytest.raises(DataPrepError, match=r"unfinished work on other inputs.*--overwrite"):
        prepare(spec)
    prepare(spec, overwrite=True)


@pytest.mark.thorough
def test_work_without_progress_is_restarted(prepared: PrepSpec, tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text("{}")
    spec = prepared.model_copy(
        update={"output": tmp_path / "out", "tokenizer": tmp_path / "no.json"}
    )
    with pytest.raises(DataPrepError, match=r"no.json"):
        prepare(spec)
    prepare(spec.model_copy(update={"tokenizer": prepared.tokenizer}))
