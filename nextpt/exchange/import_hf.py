"""A Hugging Face folder as a decoder, or as the weights that training starts from.

Only safetensors and JSON are read. Weights are read by range, so a rank of a training job reads
what it will hold.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.tokenizer.description import Description
from nextpt.base.errors import CheckpointError
from nextpt.checkpoint.chunks import Chunk, chunk_numel, split_range, whole
from nextpt.checkpoint.state import WEIGHT
from nextpt.config import Config, ModelSection, parse_config
from nextpt.exchange.architectures import effective_window
from nextpt.exchange.export_hf import EXACT, inexact_parameters
from nextpt.exchange.reading import read_config
from nextpt.exchange.tensors import Stored, stored_tensors
from nextpt.model import Decoder, build_decoder

FLOATS = ("F64", "F32", "F16", "BF16")
# Who continues from a model may change these, for longer contexts say; the parameters fit all the
# same.
FREE = ("rope_base", "rope_scaling", "norm_eps", "logit_softcap", "sliding_window")
# Old exports hold them; they follow from the config
BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq")


class HFWeights:
    """The weights of a folder under our parameter names: the `FragmentReader` of a start from it.

    Moments are zero.

    section, max_position: the model it describes. Raises CheckpointError for anything that is not
    exactly such a model.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CheckpointError(
                f"folder {folder} does not exist; give a local Hugging Face folder"
            )
        self.folder = folder
        self.architecture, self.section, self.max_position = read_config(folder)
        self._open: dict[str, Any] = {}
        self._places = self._index()
        stored = stored_tensors(self.section, self.architecture)
        self._check(stored)
        # Where one parameter is stored twice, the one that is stored as it is.
        self._sources = {
            s.ours: s for s in sorted(stored, key=lambda s: s.how == "same") if s.ours is not None
        }
        self._exact = self._check_exact(inexact_parameters(stored))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every parameter."""
        return {name: s.shape for name, s in self._sources.items()}

    def read(
        self, name: str, kind: str, start: int, stop: int, chunk: Chunk | None = None
    ) -> Tensor:
        """Read a range of a parameter, fp32 [stop - start]; see `checkpoint.state.FragmentReader`.

        Zeros for any kind of state but the weight.
        """
        if kind != WEIGHT:
            return torch.zeros(stop - start)
        stored = self._sources[name]
        file, key = (
            (EXACT, name) if name in self._exact else (self._places[stored.theirs], stored.theirs)
        )
        out = torch.empty(stop - start)
        offset = 0
        outer = whole(stored.shape) if chunk is None else chunk
        for part in split_range(outer, start, stop):
            values = self._slice(file, key, tuple(slice(a, b) for a, b in part))
            out[offset : offset + chunk_numel(part)] = values.to(torch.float32).reshape(-1)
            offset += chunk_numel(part)
        return out if name in self._exact else stored.unmake(out, self.section.width)

    def _index(self) -> dict[str, str]:
        """Tensor name -> file name.

        Raises CheckpointError for pickled weights, missing files and names outside the folder.
        """
        index = self.folder / "model.safetensors.index.json"
        if not index.is_file():
            if not (self.folder / "model.safetensors").is_file():
                pickled = next(
                    iter(
                        [
                            *self.folder.glob("*.bin"),
                            *self.folder.glob("*.pt"),
                            *self.folder.glob("*.pth"),
                        ]
                    ),
                    None,
                )
                raise CheckpointError(
                    f"{self.folder} has no model.safetensors"
                    + (
                        f"; {pickled.name} is a pickle, which can run code and is not read: convert"
                        " it to safetensors"
                        if pickled
                        else ""
                    )
                )
            return dict.fromkeys(self._handle("model.safetensors").keys(), "model.safetensors")
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            bad = [
                file for file in places.values() if not re.fullmatch(r"[\w.-]+\.safetensors", file)
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} cannot be read: {error}") from None
        if bad:
            raise CheckpointError(
                f"{index} names {bad[0]!r}, which is no safetensors file of this folder"
            )
        held = {file: set(self._handle(file).keys()) for file in set(places.values())}
        for name, file in places.items():
            if name not in held[file]:
                raise CheckpointError(f"{index} says that {file} holds {name}, but it does not")
        return places

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.folder / file} cannot be read: {error}") from None
        return self._open[file]

    def _slice(self, file: str, key: str, slices: tuple[slice, ...]) -> Tensor:
        try:
            return self._handle(file).get_slice(key)[slices]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file} cannot be read: {error}") from None

    def _check(self, stored: list[Stored]) -> None:
        """Every tensor is there in its shape and a float type, constants have their value, and there is no other."""
        for s in stored:
            if s.theirs not in self._places:
                raise CheckpointError(
                    f"{self.folder} has no tensor {s.theirs}, which its config.json asks for"
                )
            view = self._handle(self._places[s.theirs]).get_slice(s.theirs)
            if tuple(view.get_shape()) != s.shape or view.get_dtype() not in FLOATS:
                raise CheckpointError(
                    f"{self.folder}: {s.theirs} is {view.get_dtype()} {tuple(view.get_shape())}, "
                    f"expected floats {s.shape}"
                )
            if s.ours is None and not torch.equal(
                view[:].float(), s.make(None, self.section.width)
            ):
                raise CheckpointError(
                    f"{self.folder}: {s.theirs} is no longer all {s.how}; a feed-forward without a"
                    " gate cannot express it"
                )
        ignored = {"lm_head.weight"} if self.section.tied_embeddings else set()
        unknown = [
            name
            for name in self._places.keys() - {s.theirs for s in stored} - ignored
            if not BUFFERS.fullmatch(name)
        ]
        if unknown:
            raise CheckpointError(
                f"{self.folder} has a tensor {min(unknown)} that the model of its config.json"
                " has not"
            )

    def _check_exact(self, names: list[str]) -> frozenset[str]:
        """Names whose exact values lie beside, as long as the tensors of the model are still those made from them."""
        if not names or not (self.folder / EXACT).is_file():
            return frozenset()
        handle = self._handle(EXACT)
        kept = []
        for name in set(handle.keys()) & set(names):
            stored, exact = self._sources[name], handle.get_tensor(name)
            if exact.shape == stored.shape and torch.equal(
                stored.make(exact, self.section.width),
                self._slice(self._places[stored.theirs], stored.theirs, ()),
            ):
                kept.append(name)
        return frozenset(kept)


def load_hf(folder: Path, device: torch.device | str = "cpu") -> tuple[Config, Decoder]:
    """The model of a local Hugging Face folder, fp32, in evaluation mode, and a config around its model section.

    Raises CheckpointError that names the file or key that cannot be read or expressed.
    """
    weights = HFWeights(folder)
    config = config_from_hf(weights)
    model = build_decoder(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                weights.read(name, "weight", 0, parameter.numel()).view(parameter.shape)
            )
    return config, model.to(device).eval()


def config_from_hf(
    weights: HFWeights,
    *,
    name: str = "imported",
    data: Path | None = None,
    sequence_length: int | None = None,
) -> Config:
    """A whole config that continues from the weights of a folder.

    What it says of training is a modest start.

    data, sequence_length: of the dataset; the folder itself and the model's positions unless given.
    """
    return parse_config(
        {
            "run": {"name": name},
            "data": {
                "path": str(data or weights.folder),
                "sequence_length": sequence_length or weights.max_position,
            },
            "model": (
                weights.section.model_copy(
                    update={"max_position": weights.max_position}
                ).model_dump(mode="json")
            ),
            "optimizer": {"lr": 2e-5},
            "schedule": {"warmup": 10},
            "train": {
                "steps": 1000,
                "global_batch_size": 32,
                "micro_batch_size": 1,
                "init_from": str(weights.folder.absolute()),
            },
        },
        str(weights.folder),
    )


def different_keys(weights: HFWeights, config: Config) -> tuple[list[str], list[str]]:
    """Keys in which a config's model differs from the folder's, as phrases: (shapes of parameters, what is done with them)."""
    mine, theirs = (
        _computed(section, positions)
        for section, positions in (
            (config.model, config.max_position),
            (weights.section, weights.max_position),
        )
    )
    found = {
        key: f"model.{key} = {mine[key]}, there {theirs[key]}"
        for key in mine
        if mine[key] != theirs[key]
    }
    return [text for key, text in found.items() if key not in FREE], [
        text for key, text in found.items() if key in FREE
    ]


def _computed(c: ModelSection, positions: int) -> dict[str, Any]:
    values = c.model_dump(
        mode="json", exclude={"attention", "cross_entropy", "init_std", "max_position"}
    )
    return values | {
        "kv_heads": c.kv_heads_,
        "head_dim": c.head_dim_,
        "ffn_width": c.ffn_width_,
        "sliding_window": effective_window(c, positions),
    }


def same_vocabulary(one: Path, other: Path) -> bool:
    """Whether two tokenizer.json give every token the same id; templates and the like aside.

    Raises DataPrepError.
    """
    a, b = (
        {**d.vocabulary} | {t.content: t.id for t in d.added}
        for d in (Description.read(one), Description.read(other))
    )
    return a == b
