"""Segments whose code is longer than the bytes, and files that ask for more than they say."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest

from nextpt.base.errors import DataError
from nextpt.evaluate.coding import container
from nextpt.evaluate.coding.container import Header, Kind, Segment, pack_segment, unpack
from nextpt.evaluate.coding.files import FileCoder
from tests.support.runs import make_run

TEXT = b"some text that an untrained model takes for noise"


@pytest.fixture(scope="module")
def coder(tmp_path_factory: pytest.TempPathFactory) -> FileCoder:
    return FileCoder(*make_run(tmp_path_factory.mktemp("run") / "run")[1:])


def kinds(coded: bytes) -> list[Kind]:
    return [segment.kind for segment in unpack(coded, "it")[1]]


def test_noise_is_stored_and_zeros_are_deflated(
    coder: FileCoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "SEGMENT", 300)
    # Bytes that are no UTF-8: each is a token
    noise = np.random.default_rng(0).integers(0xC0, 256, 300, np.uint8).tobytes()
    coded, result = coder.encode(noise, 3)
    assert coder.decode(coded, "it") == noise
    assert len(coded) <= len(noise) + 128 and result.stored == result.segments == 1
    zeros = bytes(600)
    coded, result = coder.encode(zeros, 3)
    assert coder.decode(coded, "it") == zeros and set(kinds(coded)) == {Kind.DEFLATED}
    assert result.payload < 50 < result.code_length


def test_a_code_that_is_shorter_is_kept() -> None:
    original = b"original"
    expected = Segment(Kind.CODE, b"c", zlib.crc32(original))
    assert container.shortest(b"c", original) == expected
    # Of two that are as long the code, which the figures are about
    assert container.shortest(b"12345678", original).kind == Kind.CODE
    assert container.shortest(b"123456789", original).kind == Kind.STORED


def packed(header: Header, *segments: Segment) -> bytes:
    return header.pack() + b"".join(map(pack_segment, segments))


@pytest.fixture
def header(coder: FileCoder) -> Header:
    return unpack(coder.encode(TEXT)[0], "it")[0]


@pytest.mark.parametrize("kind", [Kind.STORED, Kind.DEFLATED])
def test_no_more_comes_out_than_the_file_says(coder: FileCoder, header: Header, kind: Kind) -> None:
    """A hundred kilobytes that would inflate to a hundred megabytes are not inflated."""
    data = bytes(10**8) if kind == Kind.DEFLATED else TEXT + b"."
    deflater = zlib.compressobj(9, wbits=-15)
    body = deflater.compress(data) + deflater.flush() if kind == Kind.DEFLATED else data
    crafted = packed(header, Segment(kind, body, zlib.crc32(data)))
    with pytest.raises(DataError, match=r"segment 1 of 1 stands for more than the 49 bytes"):
        coder.decode(crafted, "it")
    short = packed(header, Segment(Kind.STORED, TEXT[1:], zlib.crc32(TEXT[1:])))
    with pytest.raises(DataError, match="it is damaged: 48 bytes came out of it, it says 49"):
        coder.decode(short, "it")


def test_a_code_gives_no_more_than_the_file_says(
    coder: FileCoder, header: Header, monkeypatch: pytest.MonkeyPatch
) -> None:
    spellings = coder.tokenizer.spellings()
    longest = max(range(len(spellings)), key=lambda token: len(spellings[token]))
    tokens = np.full(header.tokens, longest)
    monkeypatch.setattr(coder, "_run", lambda *_: (tokens, 0.0))
    monkeypatch.setattr(coder.codec, "decode", lambda _: pytest.fail("the bytes were put together"))
    small = replace(header, size=header.tokens)
    with pytest.raises(DataError, match="stands for more than"):
        coder.decode(packed(small, Segment(Kind.CODE, b"", 0)), "it")


def test_an_unknown_kind_or_a_body_that_is_not_deflated_is_refused(
    coder: FileCoder, header: Header
) -> None:
    whole = bytearray(packed(header, Segment(Kind.STORED, TEXT, zlib.crc32(TEXT))))
    assert coder.decode(bytes(whole), "it") == TEXT
    whole[len(header.pack()) + 3] |= 0xC0
    with pytest.raises(DataError, match="cut off or damaged"):
        coder.decode(bytes(whole), "it")
    for body in (b"\xff" * 20, b"", zlib.compress(TEXT)[2:-5]):
        crafted = packed(header, Segment(Kind.DEFLATED, body, zlib.crc32(TEXT)))
        with pytest.raises(DataError, match="is no deflated data"):
            coder.decode(crafted, "it")


def test_sequences_that_need_more_than_the_memory_are_refused_when_coding(
    coder: FileCoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coder, "_sequence_bytes", lambda: 2**50)
    with pytest.raises(DataError, match=r"--sequences 7 is too many: they take 7340032\.0 GiB"):
        coder.encode(TEXT, 7)
