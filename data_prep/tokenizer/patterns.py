"""Pre-tokenization patterns of published byte-level tokenizers."""

from __future__ import annotations

import re

_CASED = "|".join(
    (  # o200k: words change at a capital, marks belong to letters
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# github.com/openai/gpt-2, src/encoder.py
_GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# Words with one leading space or symbol, digits in threes, runs of symbols, indentation. Llama 3
# has it too.
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    "gpt2": _GPT2,
    "r50k_base": _GPT2,
    "p50k_base": _GPT2,
    "p50k_edit": _GPT2,
    "cl100k_base": _CL100K,
    "llama3": _CL100K,
    "qwen": _CL100K.replace(r"\p{N}{1,3}", r"\p{N}"),
    "o200k_base": _CASED,
    "o200k_harmony": _CASED,
}
# Special tokens of tiktoken's rank files, which do not hold them (tiktoken_ext/openai_public.py),
# and Qwen's.
SPECIALS: dict[str, dict[str, int]] = {
    "gpt2": {"<|endoftext|>": 50256},
    "r50k_base": {"<|endoftext|>": 50256},
    "p50k_base": {"<|endoftext|>": 50256},
    "cl100k_base": {
        "<|endoftext|>": 100257,
        "<|fim_prefix|>": 100258,
        "<|fim_middle|>": 100259,
        "<|fim_suffix|>": 100260,
        "<|endofprompt|>": 100276,
    },
    "o200k_base": {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    "qwen": {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
}


def for_oniguruma(pattern: str) -> str:
    """Rewrite a pattern such that the engine of the tokenizers library reads it as tiktoken's does.

    There "$" also matches before the end of a line, and "{1,3}+" is a repetition of a repetition
    and not a possessive one; at the end of an alternative, where nothing can be taken back, a plain
    one is the same.
    """
    pattern = re.sub(r"(\{\d+(?:,\d*)?\})\+(?=[|)]|$)", r"\1", pattern)
    return re.sub(r"(?<!\\)\$(?=[|)]|$)", r"\\z", pattern)
