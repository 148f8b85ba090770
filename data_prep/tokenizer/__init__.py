"""Tokenizers: opening, converting, training, encoding, and the bytes that each token stands for."""

from data_prep.tokenizer.convert import convert
from data_prep.tokenizer.description import END_OF_TEXT
from data_prep.tokenizer.encode import Tokenizer
from data_prep.tokenizer.train import (
    SMALLEST_VOCABULARY,
    evenly_sampled,
    train_bpe,
    write_character_tokenizer,
)

__all__ = [
    "END_OF_TEXT",
    "SMALLEST_VOCABULARY",
    "Tokenizer",
    "convert",
    "evenly_sampled",
    "train_bpe",
    "write_character_tokenizer",
]
