"""General-purpose compressors on the same bytes, as a yardstick for bits per byte."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "zlib -9": lambda data: zlib.compress(data, 9),
    "bz2 -9": lambda data: bz2.compress(data, 9),
    "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
}


def compare(documents: list[bytes]) -> dict[str, dict[str, float]]:
    """{compressor: {"bpb_documents", "bpb_concatenated"}}: bits per byte one by one, and on all of them joined.

    Joined, a compressor learns from all documents before the one it codes; a model learned from other ones before.
    """
    joined = b"".join(documents)
    if not joined:
        return {}
    return {
        name: {
            "bpb_documents": 8 * sum(len(compress(document)) for document in documents) / len(joined),
            "bpb_concatenated": 8 * len(compress(joined)) / len(joined),
        }
        for name, compress in COMPRESSORS.items()
    }
