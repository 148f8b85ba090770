"""Import from a Hugging Face folder: a decoder, or the initial weights of a training run.

Only safetensors and JSON are read. Weights are read by range, so a rank of a training job reads
only what it will hold.
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
from nextpt.config import Config, parse_config
from nextpt.exchange.export_hf import EXACT, inexact_parameters
from nextpt.exchange.reading import read_config
from nextpt.exchange.tensors import CONSTANTS, StoredTensor, stored_tensors
from nextpt.model import Decoder, ModelSpec
from nextpt.model.spec import OMITTED

FLOATS = ("F64", "F32", "F16", "BF16")
# Keys that a run that starts from a model may change, for longer contexts say: the shapes of the
# parameters do not depend on them.
FREE = (
    "rope_base",
    "local_rope_base",
    "rope_scaling",
    "norm_eps",
    "logit_softcap",
    "sliding_window",
    "layer_pattern",
)
# Keys of a fresh model, or of the tables only
UNCOMPARED = ("init_std", "residual_init", "max_position")
# Old exports hold these buffers; they follow from the config.
BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq")


class HFWeights:
    """Weights of a Hugging Face folder under our parameter names. A `FragmentReader`.

    Optimizer state reads as zero.

    Args:
        folder: A local Hugging Face folder.

    Attributes:
        architecture: Architecture of transformers.
        spec: Shape of the model that it describes.

    Raises:
        CheckpointError: The folder does not hold exactly such a model.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CheckpointError(
                f"folder {folder} does not exist; give a local Hugging Face folder"
            )
        self.folder = folder
        self.architecture, self.spec = read_config(folder)
        self._handles: dict[str, Any] = {}
        self._files_by_tensor = self._index()
        stored = stored_tensors(self.spec, self.architecture)
        self._check(stored)
        # Where one parameter is stored twice, the tensor that stores it exactly.
        self._sources = {
            s.parameter: s
            for s in sorted(stored, key=lambda s: s.is_exact)
            if s.parameter is not None
        }
        self._exact = self._check_exact(inexact_parameters(stored))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every parameter, by our names."""
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
            (EXACT, name)
            if name in self._exact
            else (self._files_by_tensor[stored.hf_name], stored.hf_name)
        )
        out = torch.empty(stop - start)
        offset = 0
        outer = whole(stored.shape) if chunk is None else chunk
        for part in split_range(outer, start, stop):
            values = self._slice(file, key, tuple(slice(a, b) for a, b in part))
            out[offset : offset + chunk_numel(part)] = values.to(torch.float32).reshape(-1)
            offset += chunk_numel(part)
        return out if name in self._exact else stored.from_hf(out, self.spec.width)

    def _index(self) -> dict[str, str]:
        """Tensor name -> file name.

        Raises:
            CheckpointError: The weights are pickles, a file is missing, or a name leads outside.
        """
        index = self.folder / "model.safetensors.index.json"
        if not index.is_file():
            if not (self.folder / "model.safetensors").is_file():
                suffixes = {".bin", ".pt", ".pth"}
                pickled = next((p for p in self.folder.iterdir() if p.suffix in suffixes), None)
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
            files_by_tensor: dict[str, str] = json.loads(index.read_text(encoding="utf-8-sig"))[
                "weight_map"
            ]
            bad = [
                file
                for file in files_by_tensor.values()
                if not re.fullmatch(r"[\w.-]+\.safetensors", file)
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} cannot be read: {error}") from None
        if bad:
            raise CheckpointError(
                f"{index} names {bad[0]!r}, which is not a safetensors file of this folder"
            )
        held = {file: set(self._handle(file).keys()) for file in set(files_by_tensor.values())}
        for name, file in files_by_tensor.items():
            if name not in held[file]:
                raise CheckpointError(f"{index} says that {file} holds {name}, but it does not")
        return files_by_tensor

    def _handle(self, file: str) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.folder / file} cannot be read: {error}") from None
        return self._handles[file]

    def _slice(self, file: str, key: str, slices: tuple[slice, ...]) -> Tensor:
        try:
            part: Tensor = self._handle(file).get_slice(key)[slices]
            return part
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file} cannot be read: {error}") from None

    def _check(self, stored: list[StoredTensor]) -> None:
        """Check names, shapes and dtypes of all tensors, and the values of the constants."""
        for s in stored:
            if s.hf_name not in self._files_by_tensor:
                raise CheckpointError(
                    f"{self.folder} has no tensor {s.hf_name}, which its config.json asks for"
                )
            view = self._handle(self._files_by_tensor[s.hf_name]).get_slice(s.hf_name)
            if tuple(view.get_shape()) != s.shape or view.get_dtype() not in FLOATS:
                raise CheckpointError(
                    f"{self.folder}: {s.hf_name} is {view.get_dtype()} {tuple(view.get_shape())}, "
                    f"expected floats {s.shape}"
                )
            if s.parameter is None and not torch.equal(
                view[:].float(), s.to_hf(None, self.spec.width)
            ):
                raise CheckpointError(
                    f"{self.folder}: {s.hf_name} is no longer all {CONSTANTS[s.transform]:g}, the"
                    " only value that nextpt can express"
                )
        ignored = {"lm_head.weight"} if self.spec.tied_embeddings else set()
        unknown = [
            name
            for name in self._files_by_tensor.keys() - {s.hf_name for s in stored} - ignored
            if not BUFFERS.fullmatch(name)
        ]
        if unknown:
            raise CheckpointError(
                f"{self.folder} has a tensor {min(unknown)} that the model of its config.json does"
                " not have"
            )

    def _check_exact(self, names: list[str]) -> frozenset[str]:
        """Parameters to read from the file of exact values.

        It counts only while the tensors of the model are those that were made from its values.
        """
        if not names or not (self.folder / EXACT).is_file():
            return frozenset()
        handle = self._handle(EXACT)
        kept = []
        for name in set(handle.keys()) & set(names):
            stored, exact = self._sources[name], handle.get_tensor(name)
            if exact.shape == stored.shape and torch.equal(
                stored.to_hf(exact, self.spec.width),
                self._slice(self._files_by_tensor[stored.hf_name], stored.hf_name, ()),
            ):
                kept.append(name)
        return frozenset(kept)


def load_hf(folder: Path, device: torch.device | str = "cpu") -> Decoder:
    """Load the model of a local Hugging Face folder, fp32, in evaluation mode.

    Args:
        folder: The folder.
        device: Where the model is placed.

    Raises:
        CheckpointError: A file or key cannot be read or expressed; it is named.
    """
    weights = HFWeights(folder)
    model = Decoder(weights.spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                weights.read(name, "weight", 0, parameter.numel()).view(parameter.shape)
            )
    return model.to(device).eval()


def config_from_hf(
    weights: HFWeights,
    *,
    name: str = "imported",
    data: Path | None = None,
    sequence_length: int | None = None,
) -> Config:
    """Make a complete config of a run that starts from the weights of a folder.

    Its training section is a modest default, to be edited.

    Args:
        weights: The folder.
        name: Key run.name.
        data: Dataset; the folder itself unless given.
        sequence_length: Of the dataset; the model's positions unless given.
    """
    return parse_config(
        {
            "run": {"name": name},
            "data": {
                "path": str(data or weights.folder),
                "sequence_length": sequence_length or weights.spec.max_position,
            },
            "model": weights.spec.to_json(),
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
    """Keys in which a config's model differs from that of the folder.

    Returns:
        Phrases about the keys that change the parameters' shapes or meaning, and about the others
        (`FREE`).
    """
    mine, theirs = (_compared(spec) for spec in (ModelSpec.from_config(config), weights.spec))
    differences = {
        key: f"model.{key} = {mine[key]}, there {theirs[key]}"
        for key in mine
        if mine[key] != theirs[key]
    }
    return [text for key, text in differences.items() if key not in FREE], [
        text for key, text in differences.items() if key in FREE
    ]


def _compared(spec: ModelSpec) -> dict[str, Any]:
    values = OMITTED | spec.to_json() | {"sliding_window": spec.effective_window}
    if not spec.has_mixed_windows and len(set(spec.rope_bases)) == 1:
        values |= {
            "layer_pattern": None,
            "rope_base": spec.rope_bases[0],
            "local_rope_base": None,
        }
    return {key: v for key, v in values.items() if key not in UNCOMPARED}


def same_vocabulary(tokenizer: Path, other: Path) -> bool:
    """Whether two tokenizer.json files give every token the same id, whatever else they say.

    Raises:
        DataPrepError: A file cannot be read.
    """
    a, b = (
        {**d.vocabulary} | {t.content: t.id for t in d.added}
        for d in (Description.read(tokenizer), Description.read(other))
    )
    return a == b
