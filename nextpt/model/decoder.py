"""The decoder: embedding, blocks, final norm and output matrix.

Shapes: B rows, T tokens, D residual width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.attention import Packing
from kernels.cross_entropy import LinearCrossEntropy
from nextpt.config import Config
from nextpt.model.dropout import dropout, mask_keys, place_keys
from nextpt.model.init import Init
from nextpt.model.layers import Block, Embedding, KVCache, RMSNorm
from nextpt.model.mtp import MTPModule, shift
from nextpt.model.rope import tables
from nextpt.model.spec import ComputeOptions, ModelSpec


class DecoderOutput(NamedTuple):
    """Result of a model's forward pass.

    Attributes:
        hidden: Final hidden states [B, T, D], normalised and divided by
            `spec.effective_logits_scaling`, ready for the model's `lm_head`.
        auxiliary_losses: Name -> loss beside the next-token loss, as a differentiable scalar, a
            mean over the tokens of this micro-batch; empty for a dense decoder. The objective
            multiplies each by its coefficient and adds it (nextpt/objective.py).
        mtp_hidden: Final hidden states of each depth of multi-token prediction, as `hidden`; empty
            where the module is in evaluation mode.
    """

    hidden: Tensor
    auxiliary_losses: dict[str, Tensor]
    mtp_hidden: tuple[Tensor, ...] = ()


class LMHead(LinearCrossEntropy):
    """Output matrix [V, D] with the loss over it; it is the embedding's where they are tied."""

    def __init__(
        self, spec: ModelSpec, options: ComputeOptions, init: Init, embedding: Embedding
    ) -> None:
        weight = embedding.weight
        if not spec.tied_embeddings:
            weight = nn.Parameter(torch.empty(spec.vocab_size, spec.width))
            init.normal_(weight, "lm_head", role="output")
        super().__init__(
            weight,
            softcap=spec.logit_softcap,
            implementation=options.cross_entropy,
            gradient=options.loss_gradient,
            logits_dtype=options.loss_logits_dtype,
            workspace_bytes=options.loss_workspace_bytes,
        )


class Decoder(nn.Module):
    """A whole decoder-only transformer.

    Args:
        spec: Shape of the model.
        seed: Each parameter is drawn from (seed, its name), so it is the same for any number of
            ranks. Dropout follows from it too.
        options: Implementations and memory of the computation; the defaults if None.
    """

    def __init__(
        self, spec: ModelSpec, *, seed: int = 0, options: ComputeOptions | None = None
    ) -> None:
        super().__init__()
        options = options or ComputeOptions()
        self.spec = spec
        self.options = options
        self.seed = seed
        init = Init(seed, spec.init_std, spec.rules, spec.residual_init == "zero")
        self.embed_tokens = Embedding(spec.vocab_size, spec.width, init, "embed_tokens")
        self.blocks = nn.ModuleList(
            Block(spec, init, f"blocks.{i}", i, options) for i in range(spec.depth)
        )
        self.mtp = nn.ModuleList(
            MTPModule(spec, init, f"mtp.{i}", options) for i in range(spec.mtp_depth)
        )
        self.final_norm = RMSNorm(spec.width, spec.norm_eps)
        self.lm_head = LMHead(spec, options, init, self.embed_tokens)
        # Not buffers: they stay fp32 when the module is cast, and a checkpoint does not need them
        self._rope = {
            base: tables(spec.max_position, spec.head_dim, base, spec.rope_scaling)
            for base in dict.fromkeys(spec.rope_bases)
        }

    if TYPE_CHECKING:  # torch.nn.Module.__call__ is untyped

        def __call__(
            self,
            tokens_BT: Tensor,
            position_ids_BT: Tensor,
            documents: Packing | None = None,
            cache: KVCache | None = None,
            sequence_numbers_B: Tensor | None = None,
        ) -> DecoderOutput:
            """Run `forward`."""

    @property
    def max_position(self) -> int:
        """Positions that the model has, tokens."""
        return self.spec.max_position

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, V."""
        return self.spec.vocab_size

    def forward(
        self,
        tokens_BT: Tensor,
        position_ids_BT: Tensor,
        documents: Packing | None = None,
        cache: KVCache | None = None,
        sequence_numbers_B: Tensor | None = None,
    ) -> DecoderOutput:
        """Compute the final hidden states, normalised, ready for `lm_head`.

        Args:
            tokens_BT: Token ids, int64 [B, T].
            position_ids_BT: Position of each token, int64 [B, T], below `max_position`.
            documents: Which tokens may attend to each other; all of a row by default.
            cache: Keys and values of the tokens before these T, which are appended to it.
            sequence_numbers_B: Number of each row in the order of the run, int64 [B], which
                determines what dropout drops; needed where it drops anything, in training.
        """
        rope = {}
        for base, (cos, sin) in self._rope.items():
            if cos.device != tokens_BT.device:
                cos, sin = cos.to(tokens_BT.device), sin.to(tokens_BT.device)
                self._rope[base] = cos, sin
            rope[base] = (cos[position_ids_BT].unsqueeze(2), sin[position_ids_BT].unsqueeze(2))
        x_BTD = self.embed_tokens(tokens_BT)
        keys = self._dropout_keys(tokens_BT.shape[1], sequence_numbers_B)
        if keys:
            x_BTD = dropout(x_BTD, keys[0], self.options.dropout)
        first_values = None
        for i, (block, base) in enumerate(zip(self.blocks, self.spec.rope_bases, strict=True)):
            dropout_keys = keys[1 + i] if keys else None
            x_BTD, values = self._run(
                block, x_BTD, rope[base], documents, cache, first_values, dropout_keys
            )
            if self.spec.value_residual and first_values is None:
                first_values = values
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        mtp_hidden, h_BTD = [], x_BTD
        # Inference has no use for the modules, and a cache none of the tokens that they need
        for k, module in enumerate(self.mtp if self.training and cache is None else (), 1):
            embedding_BTD = self.embed_tokens(shift(tokens_BT, k))
            dropout_keys = keys[self.spec.depth + k] if keys else None
            h_BTD = self._run(
                module, h_BTD, embedding_BTD, rope[base], documents, first_values, dropout_keys
            )
            mtp_hidden.append(self._output(h_BTD))
        return DecoderOutput(self._output(x_BTD), {}, tuple(mtp_hidden))

    def _dropout_keys(self, length: int, sequence_numbers_B: Tensor | None) -> list[Tensor]:
        """Keys of the tokens for the embedding, each block and each module; none without dropout.

        Raises:
            ValueError: Something is dropped, and the sequences have no numbers.
        """
        if not self.options.dropout or not self.training:
            return []
        if sequence_numbers_B is None:
            raise ValueError("dropout needs the numbers of the sequences: sequence_numbers_B")
        keys_BT = mask_keys(self.seed, sequence_numbers_B, length)
        places = 1 + self.spec.depth + self.spec.mtp_depth
        return [place_keys(keys_BT, 2 + place) for place in range(places)]

    def _run(self, module: nn.Module, *arguments: Any) -> Any:
        """Run a block, or recompute it in the backward pass where the options say so."""
        if self.options.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(module, *arguments, use_reentrant=False)
        return module(*arguments)

    def _output(self, x_BTD: Tensor) -> Tensor:
        """Final hidden states, ready for `lm_head`, from the residual stream."""
        hidden_BTD: Tensor = self.final_norm(x_BTD)
        scaling = self.spec.effective_logits_scaling
        return hidden_BTD if scaling == 1.0 else hidden_BTD / scaling


def build_decoder(config: Config) -> Decoder:
    """Build the decoder that a run config describes, with its initial weights."""
    return Decoder(
        ModelSpec.from_config(config),
        seed=config.run.seed,
        options=ComputeOptions.from_config(config),
    )


@lru_cache(maxsize=8)
def parameter_shapes(spec: ModelSpec) -> Mapping[str, tuple[int, ...]]:
    """Shape of every parameter of a decoder, by name; a tied matrix once. Allocates no weights."""
    with torch.device("meta"):
        decoder = Decoder(spec)
    shapes = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    return MappingProxyType(shapes)
