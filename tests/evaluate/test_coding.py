"""Lossless compression: exact round trips at the model's code length, and refusals."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import DataError
from nextpt.base.files import canonical_json
from nextpt.evaluate.coding import container, files
from nextpt.evaluate.coding.coder import BITS, RangeDecoder, RangeEncoder
from nextpt.evaluate.coding.container import Kind, Segment
from nextpt.evaluate.coding.files import FileCoder
from nextpt.evaluate.coding.frequencies import cumulative
from nextpt.evaluate.coding.text import ByteCodec
from nextpt.evaluate.compressors import COMPRESSORS, compare_file
from nextpt.model import Decoder
from nextpt.model.spec import OMITTED
from tests.support.models import POSITIONS, decoder
from tests.support.runs import make_run
from tests.support.tokenizers import KINDS

TOTAL = 2**BITS
PARTS = st.lists(
    st.integers(0, BITS)
    .flatmap(lambda bits: st.integers(1, 2**bits))
    .flatmap(
        lambda size: st.tuples(
            st.one_of(st.just(0), st.just(TOTAL - size), st.integers(0, TOTAL - size)),
            st.just(size),
        )
    ),
    max_size=200,
)


@pytest.mark.thorough
@settings(deadline=None, max_examples=200)
@given(PARTS)
def test_parts_decode_at_their_code_length(parts: list[tuple[int, int]]) -> None:
    encoder = RangeEncoder()
    for part in parts:
        encoder.encode(*part)
    data = encoder.finish()
    bits = sum(BITS - math.log2(size) for _, size in parts)
    assert 8 * len(data) <= 1.0001 * bits + 12
    range_decoder = RangeDecoder(data)
    for start, size in parts:
        assert start <= range_decoder.peek() < start + size
        range_decoder.take(start, size)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("vocabulary", "sharpness"),
    [(256, 4.0), (32_000, 3.0), (50_257, 3.0), (131_072, 3.0), (131_072, 8.0)],
)
def test_integer_frequencies_cost_a_thousandth_at_most(vocabulary: int, sharpness: float) -> None:
    """Compares code lengths of frequencies and probabilities; sharp ones are near 0."""
    rng = torch.Generator().manual_seed(vocabulary)
    logits = sharpness * torch.randn(60, vocabulary, generator=rng)
    ends = cumulative(logits)
    assert (
        (ends[:, 0] == 0).all()
        and (ends[:, -1] == TOTAL).all()
        and (np.diff(ends, axis=1) >= 1).all()
    )
    probabilities = logits.double().softmax(1)
    expected = -(probabilities * probabilities.log2()).sum(dim=1)
    parts = torch.from_numpy(np.diff(ends, axis=1)).double() / TOTAL
    coded = -(probabilities * parts.log2()).sum(dim=1)
    assert (coded.sum() / expected.sum()).item() <= 1.001
    if vocabulary == 131_072:
        print(f"{coded.sum() / expected.sum() - 1:.2%} at {expected.mean():.1f} bits per token")


@pytest.fixture(scope="module")
def coder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileCoder]:
    """A coder that keeps its codes, though this untrained model's are longer than the bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "shortest", coded_segment)
        yield FileCoder(*make_run(tmp_path_factory.mktemp("run") / "run")[1:])


def coded_segment(code: bytes, original: bytes) -> Segment:
    return Segment(Kind.CODE, code, zlib.crc32(original))


@pytest.mark.thorough
@settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    data=st.one_of(
        st.binary(max_size=60),
        st.text(max_size=40).map(lambda t: t.encode("utf-8", "surrogatepass")),
    ),
    sequences=st.integers(1, 5),
)
def test_any_bytes_round_trip(coder: FileCoder, data: bytes, sequences: int) -> None:
    coded, result = coder.encode(data, sequences)
    assert coder.decode(coded, "it") == data
    assert result.header + result.payload == len(coded) and result.header <= 128
    assert result.payload <= 1.001 * result.code_length + 8


@pytest.mark.thorough
@pytest.mark.parametrize("vocabulary", [32_000, 50_257, 131_072])
def test_models_of_large_vocabularies_code_at_their_code_length(
    coder: FileCoder, vocabulary: int
) -> None:
    """Logits have a standard deviation of 3, as of trained models.

    The tokenizer uses the first tokens only, so every token has a long code.
    """
    _, model = decoder(vocab_size=vocabulary, init_std=0.5)
    large = FileCoder(model, coder.tokenizer)
    data = b"Whan that Aprille with his shoures soote, and \xff\x00 bytes"
    coded, result = large.encode(data, 4)
    assert large.decode(coded, "it") == data and result.code_length > 50
    assert result.payload <= 1.001 * result.code_length + 8


@pytest.mark.thorough
@pytest.mark.parametrize("sequences", [1, 3])
def test_texts_longer_than_the_context(
    coder: FileCoder, sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "SEGMENT", 150)
    data = ("Bytes and text: ä 漢字 \U0001f600 " * 12).encode() + bytes(range(256))
    coded, result = coder.encode(data, sequences)
    assert result.tokens > 2 * 150 > sequences * POSITIONS and coder.decode(coded, "it") == data
    assert result.payload <= 1.001 * result.code_length + 8 + 14 * (result.tokens // 150)


@pytest.mark.thorough
def test_a_file_of_another_model_or_environment_is_refused(
    coder: FileCoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded, _ = coder.encode(b"some text")
    _, model, tokenizer = make_run(tmp_path / "other")
    same = FileCoder(model, tokenizer)
    assert same.decode(coded, "it") == b"some text"
    with torch.no_grad():
        model.final_norm.weight[0] += 1e-6
    with pytest.raises(DataError, match="it was coded with another model"):
        FileCoder(model, tokenizer).decode(coded, "it")
    monkeypatch.setattr(coder, "environment", "torch 9")
    with pytest.raises(DataError, match=r"it was coded with torch 2.*; here is torch 9"):
        coder.decode(coded, "it")


@pytest.mark.thorough
def test_a_damaged_file_is_refused(coder: FileCoder) -> None:
    data = b"some text, and more of it " * 3
    coded, result = coder.encode(data)
    for length in range(len(coded)):
        with pytest.raises(DataError, match="it "):
            coder.decode(coded[:length], "it")
    rng = np.random.default_rng(0)
    for index in [*range(result.header), *rng.integers(result.header, len(coded), 20)]:
        flipped = bytearray(coded)
        flipped[index] ^= 1 << int(rng.integers(8))
        decoded, message = None, "it"
        try:
            decoded = coder.decode(bytes(flipped), "it")
        except DataError as error:
            message = str(error)
        # Threads and sequences have no check of their own
        assert decoded in (None, data) and "it" in message, index
    with pytest.raises(DataError, match="it was not made by nextpt compress"):
        coder.decode(b"PK\3\4 something else", "it")


def test_damage_that_looks_like_a_size_is_refused_at_once(coder: FileCoder) -> None:
    coded, _ = coder.encode(b"some text")
    header, segments = container.unpack(coded, "it")
    for changed in (
        replace(header, tokens=2**60),
        replace(header, tokens=2**50, size=2**62),
        replace(header, sequences=0),
        replace(header, size=0),
        replace(header, window=0),
        replace(header, threads=2**16 - 1),
    ):
        with pytest.raises(DataError, match="cut off or damaged"):
            container.unpack(changed.pack() + container.pack_segment(segments[0]), "it")


def test_counts_beyond_this_machine_are_refused(
    coder: FileCoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is started or allocated for them."""
    coded, _ = coder.encode(b"some text")
    header, segments = container.unpack(coded, "it")
    body = container.pack_segment(segments[0])
    threads = 4 * os.cpu_count() + 1

    def refuse(*_: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(torch, "set_num_threads", refuse)
    with pytest.raises(DataError, match=f"it asks for {threads} threads, and this machine has"):
        coder.decode(replace(header, threads=threads).pack() + body, "it")
    monkeypatch.setattr(coder, "_sequence_bytes", lambda: 2**60)
    with pytest.raises(DataError, match=r"it asks for 1 sequences, and they take 10737418"):
        coder.decode(coded, "it")


@pytest.mark.thorough
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_tokenizer_encodes_any_bytes_or_is_refused(kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "tokenizer.json")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    spelled, message = None, ""
    try:
        spelled = ByteCodec(tokenizer)
    except DataError as error:
        message = str(error)
    if spelled is None:
        assert "of the 256 bytes" in message
        assert kind not in ("byte_level", "llama")
        assert not any(step["type"] == "ByteLevel" for step in tokenizer._description.steps)
        return
    text = "plain words, and no others. " * 4
    assert len(spelled.encode(text.encode())) < 0.9 * len(text)  # not byte by byte
    for data in (
        b"",
        b"plain",
        bytes(range(256)),
        "  ä\u0301 é 漢字\n\n don't ﬁ".encode(),
        b"\xff\xfetext\xc3",
    ):
        assert spelled.decode(spelled.encode(data)) == data


def test_compressors_that_read_another_text_first() -> None:
    text = b"the same words again and again, and some others: " + bytes(range(65, 91))
    alone, primed = compare_file(text), compare_file(text, text)
    assert set(alone) == set(primed) == set(COMPRESSORS)
    assert all(primed[name]["bytes"] < alone[name]["bytes"] for name in COMPRESSORS)
    assert compare_file(b"") == {}


def test_a_device_that_is_not_deterministic_is_refused(
    coder: FileCoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coder, "decode", lambda *_: b"something else")
    with pytest.raises(DataError, match="does not come back as it was"):
        coder.encode(b"some text")


def test_many_threads_have_room_in_the_header() -> None:
    header = container.Header(384, 64, 4096, bytes(16), 10, 0, "e" * container.LONGEST_ENVIRONMENT)
    assert container.unpack(header.pack(), "it") == (header, [])
    assert len(header.pack()) + 12 <= 128


@pytest.mark.thorough
def test_files_of_version_2_are_read_whatever_the_config_left_out(tmp_path: Path) -> None:
    """Version 2 hashed the config's model section, with null for derived values."""
    config, model, tokenizer = make_run(tmp_path / "run", kv_heads=None, ffn_width=None)
    coder = FileCoder(model, tokenizer)
    coded, _ = coder.encode(b"some text")
    left_out = {"attention", "cross_entropy", "dropout", *OMITTED}
    section = config.model.model_dump(exclude=left_out)
    old = hashed_as_before([section, config.max_position], model, tokenizer)
    assert section["kv_heads"] is None and old != coder.digest
    header, segments = container.unpack(coded, "it")
    old_file = replace(header, version=2, model=old).pack() + coded[len(header.pack()) :]
    assert coder.decode(old_file, "it") == b"some text" and len(segments) == 1
    other = replace(header, version=2, model=bytes(16)).pack() + coded[len(header.pack()) :]
    with pytest.raises(DataError, match="it was coded with another model"):
        coder.decode(other, "it")


def hashed_as_before(shape: list[Any], model: Decoder, tokenizer: Tokenizer) -> bytes:
    """The digest of a model in files of version 2."""
    hashed = xxhash.xxh3_128(canonical_json(shape).encode())
    hashed.update(tokenizer.sha256.encode())
    for name, parameter in sorted(model.named_parameters()):
        hashed.update(name.encode())
        hashed.update(parameter.detach().numpy().tobytes())
    return hashed.digest()


@pytest.mark.process
def test_compression_is_verified_without_assertions(tmp_path: Path) -> None:
    """`python -O` removes assertions; the comparison after coding must stay."""
    make_run(tmp_path / "run")
    program = f"""
from pathlib import Path
from nextpt.base.errors import DataError
from nextpt.base.files import canonical_json
from nextpt.evaluate.coding.files import FileCoder
from nextpt.evaluate.loaded_model import open_model

loaded = open_model(Path({str(tmp_path / "run")!r}))
coder = FileCoder(loaded.decoder, loaded.tokenizer)
coder.decode = lambda *_: b"something else"
try:
    coder.encode(b"some text")
except DataError as error:
    print(__debug__, error)
"""
    command = [sys.executable, "-O", "-c", program]
    completed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert completed.stdout.startswith("False the file does not come back as it was")
