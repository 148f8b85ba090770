"""General-purpose compressors on the same bytes, as a yardstick for bits per byte."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from contextlib import suppress

import zstandard

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "zlib -9": lambda data: zlib.compress(data, 9),
    "bz2 -9": lambda data: bz2.compress(data, 9),
    "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    "zstd -22": lambda data: zstandard.ZstdCompressor(level=22).compress(data),
}
with suppress(ImportError):  # of the extra `compressors`
    import pyppmd

    # 7-Zip's PPMd, of order 6 as its own default, with memory for far more than any text that is
    # compared
    COMPRESSORS["PPMd -o6"] = lambda data: pyppmd.compress(data, max_order=6, mem_size=2**28)


def compare(documents: list[bytes]) -> dict[str, dict[str, float]]:
    """Compress documents one by one, and all of them joined.

    Joined, a compressor learns from all documents before the one that it codes; a model learned
    from other ones before.

    Returns:
        Compressor -> "bpb_documents" and "bpb_concatenated", bits per byte; {} without bytes.
    """
    joined = b"".join(documents)
    if not joined:
        return {}
    return {
        name: {
            "bpb_documents": (
                8 * sum(len(compress(document)) for document in documents) / len(joined)
            ),
            "bpb_concatenated": 8 * len(compress(joined)) / len(joined),
        }
        for name, compress in COMPRESSORS.items()
    }


def compare_file(data: bytes, prefix: bytes = b"") -> dict[str, dict[str, float]]:
    """Compress one file.

    Args:
        data: Content of the file.
        prefix: What each compressor reads first; the size is what `data` adds to it.

    Returns:
        Compressor -> "bytes" and "bits_per_byte"; {} without bytes.
    """
    if not data:
        return {}
    sizes = {
        name: len(compress(prefix + data)) - (len(compress(prefix)) if prefix else 0)
        for name, compress in COMPRESSORS.items()
    }
    return {
        name: {"bytes": size, "bits_per_byte": 8 * size / len(data)} for name, size in sizes.items()
    }
