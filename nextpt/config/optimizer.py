"""Config sections `optimizer` and `schedule`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from nextpt.config.section import Section, key

POLAR_EXPRESS_STEPS = 5  # iterations for which the coefficients are tabled
UpdateScale = Literal["match_rms_adamw", "original", "spectral"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamWGroup(Section):
    """AdamW's options for one group of parameters, where they differ from those of `optimizer`."""

    lr: float | None = key(None, gt=0, description="peak learning rate; null: optimizer.lr")
    weight_decay: float | None = key(
        None,
        ge=0,
        description=(
            "decoupled weight decay; null: optimizer.weight_decay for output, 0 for vectors, by"
            " optimizer.decay_embeddings for embedding"
        ),
    )
    betas: tuple[Beta, Beta] | None = key(
        None, description="decay rates of the moments; null: optimizer.betas"
    )


class MuonSection(Section):
    """Muon (kellerjordan.github.io/posts/muon) for the matrices of the blocks (docs/recipe.md)."""

    lr: float | None = key(
        None,
        gt=0,
        description="peak learning rate of the matrices; null: optimizer.lr",
        aliases=("muon_lr", "matrix_lr"),
    )
    weight_decay: float | None = key(
        None,
        ge=0,
        description="decoupled weight decay of the matrices; null: optimizer.weight_decay",
        aliases=("muon_weight_decay",),
    )
    cautious_weight_decay: bool = key(
        False,
        description="only weights decay that the update shrinks too (arXiv 2510.12402)",
        aliases=("cautious", "cautious_wd"),
    )
    momentum: float = key(
        0.95,
        ge=0,
        lt=1,
        description="decay rate of the averaged gradient",
        aliases=("mu", "muon_momentum", "muon_beta"),
    )
    nesterov: bool = key(
        True, description="orthogonalise the average of the gradient and its average"
    )
    scale: UpdateScale = key(
        "match_rms_adamw",
        description=(
            "factor of an update of a matrix [out, in]: 0.2 sqrt(max(out, in)), with AdamW's"
            " learning rate (arXiv 2502.16982); sqrt(max(1, out/in)); or sqrt(out/in), which"
            " transfers over widths (arXiv 2310.17813)"
        ),
        aliases=("adjust_lr", "adjust_lr_fn", "scale_mode", "muon_scale_mode"),
    )
    coefficients: Literal["keller", "polar_express"] = key(
        "keller",
        description="of the Newton-Schulz iteration: Keller Jordan's, or those of arXiv 2505.16932",
        aliases=("ns_coefficients", "coefficient_type"),
    )
    newton_schulz_steps: int = key(
        5,
        ge=1,
        le=20,
        unit="iterations",
        description="Newton-Schulz iterations of an orthogonalization",
        aliases=("ns_steps", "num_ns_steps", "muon_num_ns_steps", "backend_steps"),
    )
    normuon_beta: float | None = key(
        None,
        ge=0,
        lt=1,
        description=(
            "decay rate of the mean square of each row of the orthogonalized matrix, by whose root"
            " the row is divided (NorMuon, arXiv 2510.05491); null: plain Muon"
        ),
        aliases=("muon_beta2", "normuon_beta2"),
    )

    @model_validator(mode="after")
    def _check(self) -> MuonSection:
        if self.scale != "match_rms_adamw" and self.lr is None:
            raise ValueError(
                f"optimizer.muon.scale = {self.scale} needs another learning rate than AdamW; set"
                " optimizer.muon.lr (0.02 is usual), or leave optimizer.muon.scale out"
            )
        steps = self.newton_schulz_steps
        if self.coefficients == "polar_express" and steps > POLAR_EXPRESS_STEPS:
            raise ValueError(
                f"optimizer.muon.newton_schulz_steps = {steps}, and polar_express has coefficients"
                f" for {POLAR_EXPRESS_STEPS} iterations; use at most as many, or"
                " optimizer.muon.coefficients=keller"
            )
        return self


class OptimizerSection(Section):
    """The optimizer; `kind` says which (nextpt/optim/registry.py)."""

    kind: Literal["adamw", "muon"] = key(
        "adamw",
        description=(
            "adamw: matrices decay, vectors (norms, biases) do not; muon: Muon for the matrices of"
            " the blocks, AdamW for all other parameters"
        ),
        aliases=("optimizer_type", "optim_type", "type", "name"),
    )
    lr: float = key(
        gt=0,
        description="peak learning rate, where a group of parameters has no other",
        aliases=("learning_rate", "max_lr", "peak_lr", "base_lr"),
    )
    betas: tuple[Beta, Beta] = key(
        (0.9, 0.95),
        description="decay rates of the first and second moments (arXiv 1412.6980)",
        aliases=("beta1", "beta2", "beta_1", "beta_2", "adam_beta1", "adam_beta2"),
    )
    eps: float = key(
        1e-8,
        gt=0,
        description="epsilon added to the root of the second moment",
        aliases=("epsilon", "adam_eps", "adam_epsilon"),
    )
    weight_decay: float = key(
        0.1, ge=0, description="decoupled weight decay", aliases=("wd", "decay_rate")
    )
    decay_embeddings: bool = key(False, description="embeddings decay too")
    grad_clip: float | None = key(
        1.0,
        gt=0,
        description="largest global gradient norm; null: no clipping",
        aliases=(
            "clip_grad",
            "gradient_clipping",
            "max_grad_norm",
            "grad_norm_clip",
            "gradient_clip_val",
            "clip_grad_norm",
            "max_norm",
        ),
    )
    embedding: AdamWGroup = key(
        AdamWGroup(), description="options of the embedding; a tied output matrix is part of it"
    )
    output: AdamWGroup = key(
        AdamWGroup(), description="options of the output matrix", aliases=("head", "lm_head")
    )
    vectors: AdamWGroup = key(
        AdamWGroup(), description="options of norms and biases", aliases=("norms", "scalars")
    )
    muon: MuonSection | None = key(
        None, description="options of kind = muon; dropped where another kind is set"
    )

    @model_validator(mode="before")
    @classmethod
    def _default_muon(cls, values: Any) -> Any:
        """With kind = muon, a section that is left out has its defaults.

        A config of Muon becomes one of another kind by that one key: its section is dropped.
        """
        if not isinstance(values, dict):
            return values
        if values.get("kind") == "muon":
            return {**values, "muon": values.get("muon") or {}}
        return {**values, "muon": None} if "kind" in values else values

    @model_validator(mode="after")
    def _check_muon(self) -> OptimizerSection:
        if self.muon is not None and self.kind != "muon":
            raise ValueError(
                "optimizer.muon is for optimizer.kind = muon, and no kind is set; set it to muon,"
                " or remove optimizer.muon"
            )
        return self


class ScheduleSection(Section):
    """Learning-rate schedule: warm-up, then one of the shapes of nextpt/optim/schedules.py."""

    kind: Literal["cosine", "linear", "wsd", "power", "constant"] = key(
        "cosine",
        description=(
            "shape after the warm-up: to the end (cosine, linear), or stable (wsd), falling slowly"
            " (power), then a final decay"
        ),
        aliases=("lr_scheduler_type", "scheduler_type", "lr_decay_style", "lr_schedule"),
    )
    unit: Literal["steps", "tokens"] = key("steps", description="unit of the lengths here")
    warmup: int = key(
        0,
        ge=0,
        unit="schedule.unit",
        description="length of the linear warm-up",
        aliases=(
            "warmup_steps",
            "warmup_iters",
            "num_warmup_steps",
            "lr_warmup_steps",
            "warmup_tokens",
            "warmup_ratio",
        ),
    )
    decay: int | None = key(
        None,
        ge=1,
        unit="schedule.unit",
        description="wsd, power: length of the final decay; 20 % of the run unless set",
        aliases=("decay_steps", "lr_decay_iters", "cooldown", "cooldown_steps", "lr_decay_steps"),
    )
    decay_shape: Literal["linear", "sqrt"] = key(
        "linear",
        description="wsd, power: the final decay is linear, or 1 - sqrt(share of it that is over)",
        aliases=("decay_type", "cooldown_type", "lr_wsd_decay_style", "decay_style"),
    )
    power_from: int | None = key(
        None,
        ge=1,
        unit="schedule.unit",
        description="power: point of the run until which the learning rate stays at its peak",
    )
    power_exponent: float = key(
        0.51,
        gt=0,
        le=1,
        description="power: exponent with which the learning rate falls after power_from",
    )
    batch_scaling: Literal["none", "sqrt", "linear"] = key(
        "none",
        description=(
            "factor of the learning rate where the batch changes: a power of batch /"
            " train.global_batch_size"
        ),
        aliases=("scale_lr", "lr_batch_scaling"),
    )
    final_ratio: float = key(
        0.1,
        ge=0,
        le=1,
        description=(
            "last learning rate / peak (power: / that before the decay); 0, unset for linear: zero"
            " is reached just after the last step"
        ),
        aliases=("min_lr", "min_lr_ratio", "final_lr", "alpha_f", "min_ratio"),
    )

    @model_validator(mode="before")
    @classmethod
    def _linear_ends_at_zero(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("kind") == "linear":
            return {"final_ratio": 0.0, **values}
        return values

    @property
    def has_final_decay(self) -> bool:
        """Whether a decay of its own length ends the run."""
        return self.kind in ("wsd", "power")

    @model_validator(mode="after")
    def _check_keys_of_kinds(self) -> ScheduleSection:
        if not self.has_final_decay:
            for name, default in (("decay", None), ("decay_shape", "linear")):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"schedule.{name} is for schedule.kind = wsd or power only; leave it out"
                        f" with schedule.kind = {self.kind}"
                    )
        if (self.kind == "power") != (self.power_from is not None):
            raise ValueError(
                f"schedule.power_from = {self.power_from} with schedule.kind = {self.kind}; it is"
                " for schedule.kind = power, which needs it"
            )
        if self.power_from is not None and self.power_from < self.warmup:
            raise ValueError(
                f"schedule.power_from = {self.power_from} is before the end of the warm-up"
                f" (schedule.warmup = {self.warmup}); set it to that or more"
            )
        return self
