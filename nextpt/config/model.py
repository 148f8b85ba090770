"""Config section `model`: shape of the decoder and choice of its kernels."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from nextpt.config.section import Section, key

FeedForwardKind = Literal["swiglu", "gelu", "relu2"]
LayerKind = Literal["local", "global"]
AttentionGate = Literal["none", "head", "element"]
ResidualInit = Literal["scaled", "zero"]
ParametrizationKind = Literal["standard", "mup", "completep"]


class RopeScaling(Section):
    """Scaling of the rotary frequencies for contexts longer than those of the original model."""

    kind: Literal["linear", "llama3", "yarn"] = key(
        "linear", description="scaling rule", aliases=("rope_type",)
    )
    factor: float = key(gt=1.0, description="ratio of the new context to the original one")
    original_max_position: int = key(
        gt=0,
        unit="tokens",
        description="positions of the original model",
        aliases=("original_max_position_embeddings",),
    )
    low_freq_factor: float = key(
        1.0, gt=0, description="llama3: wavelengths above original/low are scaled fully"
    )
    high_freq_factor: float = key(
        4.0, gt=0, description="llama3: wavelengths below original/high are kept"
    )
    beta_fast: float = key(
        32.0, gt=0, description="yarn: rotations above which a frequency is kept"
    )
    beta_slow: float = key(
        1.0, gt=0, description="yarn: rotations below which a frequency is scaled fully"
    )


class ModelSection(Section):
    """A pre-norm decoder-only transformer."""

    vocab_size: int = key(
        ge=2,
        le=2**32 - 1,
        unit="tokens",
        description="size of the vocabulary; must equal the dataset's",
        aliases=("vocabulary_size", "n_vocab", "padded_vocab_size"),
    )
    depth: int = key(
        ge=1,
        description="number of blocks",
        aliases=("num_layers", "n_layer", "n_layers", "num_hidden_layers", "layers", "num_blocks"),
    )
    width: int = key(
        ge=8,
        description="width of the residual stream",
        aliases=("hidden_size", "d_model", "n_embd", "dim", "hidden_dim", "embed_dim", "emb_dim"),
    )
    heads: int = key(
        ge=1,
        description="query heads",
        aliases=("n_heads", "n_head", "num_heads", "num_attention_heads"),
    )
    kv_heads: int | None = key(
        None,
        ge=1,
        description="key/value heads (grouped-query attention); heads unless set",
        aliases=(
            "num_key_value_heads",
            "n_kv_heads",
            "n_kv_head",
            "num_kv_heads",
            "n_query_groups",
        ),
    )
    head_dim: int | None = key(
        None,
        ge=2,
        description="width of a head; width/heads unless set",
        aliases=("head_size", "d_head", "head_width"),
    )
    ffn: FeedForwardKind = key(
        "swiglu",
        description="kind of feed-forward layer; relu2 is relu(x)^2 (arXiv 2109.08668)",
        aliases=("hidden_act", "activation", "activation_function", "mlp", "mlp_type"),
    )
    ffn_width: int | None = key(
        None,
        ge=1,
        description=(
            "hidden width of the feed-forward layer; unless set 8/3 (swiglu) or 4 (gelu, relu2) x"
            " width, rounded up to a multiple of 64"
        ),
        aliases=(
            "intermediate_size",
            "d_ff",
            "ffn_dim",
            "ffn_hidden_size",
            "n_inner",
            "mlp_dim",
            "mlp_hidden_size",
        ),
    )
    max_position: int | None = key(
        None,
        ge=2,
        unit="tokens",
        description="largest position; data.sequence_length unless set",
        aliases=("max_position_embeddings", "n_positions", "max_positions"),
    )
    rope_base: float = key(
        10000.0,
        gt=1.0,
        description="base of the rotary embeddings (arXiv 2104.09864)",
        aliases=("rope_theta", "rotary_base", "rotary_emb_base"),
    )
    local_rope_base: float | None = key(
        None,
        gt=1.0,
        description="base of the rotary embeddings of local layers; rope_base unless set",
        aliases=("rope_local_base_freq", "local_rope_theta", "swa_rope_theta", "layer_rope_theta"),
    )
    rope_scaling: RopeScaling | None = key(
        None, description="scaling of the rotary frequencies for longer contexts"
    )
    qk_norm: bool = key(False, description="RMSNorm on queries and keys (arXiv 2302.05442)")
    tied_embeddings: bool = key(
        False,
        description="the output matrix is the embedding",
        aliases=("tie_word_embeddings", "tie_embeddings", "weight_tying"),
    )
    bias: bool = key(
        False,
        description="biases in all linear layers",
        aliases=("attention_bias", "mlp_bias", "use_bias", "add_bias_linear"),
    )
    norm_eps: float = key(
        1e-5,
        gt=0,
        description="epsilon of RMSNorm",
        aliases=("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    )
    init_std: float = key(
        0.02,
        gt=0,
        description="standard deviation of the initial matrices",
        aliases=("initializer_range", "init_method_std"),
    )
    residual_init: ResidualInit = key(
        "scaled",
        description=(
            "initial matrices whose output is added to the residual stream (o_proj, down_proj):"
            " init_std / sqrt(2 depth), or zero"
        ),
        aliases=("zero_init", "zero_init_residual", "zero_init_proj"),
    )
    parametrization: ParametrizationKind = key(
        "standard",
        description=(
            "how initial weights, learning rates, decay, eps and multipliers follow from those"
            " of the base shape: not at all, by width (mup, arXiv 2203.03466), or by width and"
            " depth (completep, arXiv 2505.01618)"
        ),
        aliases=("parameterization", "mup", "use_mup", "mup_enabled", "completep"),
    )
    base_width: int | None = key(
        None,
        ge=1,
        description=(
            "width for which init_std and the optimizer's options are meant; without effect with"
            " parametrization = standard"
        ),
        aliases=("mup_base_width", "base_hidden_size", "mup_base_hidden_size"),
    )
    base_depth: int | None = key(
        None,
        ge=1,
        description="the same in blocks; has an effect with parametrization = completep only",
        aliases=("mup_base_depth", "base_num_layers", "base_n_layers"),
    )
    base_head_dim: int | None = key(
        None,
        ge=1,
        description=(
            "head_dim E at which attention logits are divided by sqrt(E); other ones are divided"
            " by E / sqrt(base_head_dim). head_dim unless set"
        ),
        aliases=("mup_base_head_size", "mup_base_head_dim"),
    )
    residual_multiplier: float = key(
        1.0,
        gt=0,
        description="factor on what attention and feed-forward add to the residual stream",
        aliases=("residual_scale", "resid_scale", "m_residual"),
    )
    logits_scaling: float = key(
        1.0,
        gt=0,
        description="divisor of the output logits, before logit_softcap",
        aliases=("logit_scale", "logits_scale", "output_mult", "m_logits"),
    )
    logit_softcap: float | None = key(
        None,
        gt=0,
        description="cap c of the output logits, c tanh(z / c) (Gemma 2, arXiv 2408.00118)",
        aliases=("final_logit_softcapping", "final_logit_softcap"),
    )
    sliding_window: int | None = key(
        None,
        ge=1,
        unit="tokens",
        description=(
            "keys that a query of a local layer attends to, itself included; unless set, all"
            " layers are global"
        ),
        aliases=("window_size", "attention_window"),
    )
    layer_pattern: tuple[LayerKind, ...] | None = key(
        None,
        min_length=1,
        description=(
            "local (sliding_window) and global layers, a list that repeats from the last layer"
            " backwards; all alike unless set"
        ),
        aliases=(
            "sliding_window_pattern",
            "layer_types",
            "window_pattern",
            "window_attn_skip_freq",
        ),
    )
    attention_sinks: bool = key(
        False,
        description=(
            "a learned logit per head that takes part in the softmax of attention and carries no"
            " value (gpt-oss, arXiv 2508.10925)"
        ),
        aliases=("sinks", "attn_sinks", "use_sinks", "add_swa_attention_sink_bias", "softmax_type"),
    )
    attention_gate: AttentionGate = key(
        "none",
        description=(
            "sigmoid gate, computed from the layer's input, on the output of attention: one per"
            " head, or one per element (arXiv 2505.06708)"
        ),
        aliases=("attn_output_gate", "attention_output_gate", "gated_attention", "use_gate"),
    )
    value_residual: bool = key(
        False,
        description=(
            "mix the values of each layer's attention with those of the first layer, by a learned"
            " share that starts at 1/2 (arXiv 2410.17897)"
        ),
        aliases=("value_residuals", "v_residual", "resformer"),
    )
    dropout: float = key(
        0.0,
        ge=0,
        lt=1,
        description=(
            "share of the embedding, and of what attention and feed-forward add to the residual"
            " stream, that is set to 0 in training (arXiv 1207.0580); for data that is read many"
            " times"
        ),
        aliases=(
            "resid_pdrop",
            "embd_pdrop",
            "hidden_dropout",
            "residual_dropout",
            "resid_dropout",
            "hidden_dropout_prob",
            "dropout_rate",
        ),
    )
    mtp_depth: int = key(
        0,
        ge=0,
        le=8,
        description=(
            "modules of multi-token prediction, each of which predicts a token further ahead, in"
            " training only (DeepSeek-V3, arXiv 2412.19437); weighted by objective.mtp_weight"
        ),
        aliases=(
            "mtp_num_layers",
            "num_nextn_predict_layers",
            "n_future_tokens",
            "future_tokens",
            "num_mtp_layers",
            "multi_token_prediction",
        ),
    )
    attention: str = key(
        "auto",
        may_change=True,
        description=(
            "attention implementation: auto (on CUDA the quickest in the run's own shapes, by"
            " trials at its start), or one by name"
        ),
        aliases=("attn_implementation", "attn_impl", "use_flash_attention", "flash_attention"),
    )
    cross_entropy: str = key(
        "auto",
        may_change=True,
        description="loss implementation: auto (on CUDA by trials at the start), or one by name",
        aliases=("loss_implementation", "fused_cross_entropy"),
    )

    @property
    def resolved_head_dim(self) -> int:
        """Width of a head, E."""
        return self.head_dim or self.width // self.heads

    @model_validator(mode="after")
    def _check_shape(self) -> ModelSection:
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(
                f"model.width = {self.width} is not a multiple of model.heads = {self.heads}; "
                "change one of them or set model.head_dim"
            )
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(
                f"model.heads = {self.heads} is not a multiple of model.kv_heads = {self.kv_heads}"
            )
        if self.resolved_head_dim % 2:
            raise ValueError(
                f"model.head_dim = {self.resolved_head_dim} is odd; rotary embeddings need an even"
                " one"
            )
        return self

    @model_validator(mode="after")
    def _check_parametrization(self) -> ModelSection:
        kind = self.parametrization
        if kind == "standard":
            return self
        needed = {"base_width": self.width}
        if kind == "completep":
            needed["base_depth"] = self.depth
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            keys = " and ".join(f"model.{name}" for name in missing)
            values = " ".join(f"model.{name}={needed[name]}" for name in missing)
            raise ValueError(
                f"model.parametrization = {kind} needs {keys}, the shape for which learning rates"
                f" and init_std are meant; set it ({values} where they were found for this model)"
            )
        if self.qk_norm and self.base_head_dim not in (None, self.resolved_head_dim):
            raise ValueError(
                f"model.base_head_dim = {self.base_head_dim} has no effect with model.qk_norm ="
                " true, whose norms bound the attention logits at any head_dim; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_layers(self) -> ModelSection:
        pattern, window = self.layer_pattern, self.sliding_window
        if pattern is not None:
            if len(pattern) > self.depth:
                raise ValueError(
                    f"model.layer_pattern has {len(pattern)} layers, more than model.depth ="
                    f" {self.depth}; shorten it"
                )
            if "local" in pattern and window is None:
                raise ValueError(
                    "model.layer_pattern has local layers, but model.sliding_window is not set;"
                    " set it to the keys that a query of theirs attends to"
                )
            if "local" not in pattern and window is not None:
                raise ValueError(
                    f"model.sliding_window = {window} has no effect, since model.layer_pattern has"
                    " no local layer; remove one of them"
                )
        if window is None and self.local_rope_base not in (None, self.rope_base):
            raise ValueError(
                f"model.local_rope_base = {self.local_rope_base} has no effect without local"
                " layers; set model.sliding_window"
            )
        return self
