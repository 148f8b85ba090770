"""The description of a run: every key, its meaning, unit and bound.

A run is one YAML file. OmegaConf merges `key.sub=value` overrides into it, pydantic checks every
key and value, and everything that can be computed (accumulation steps, total tokens, ...) is
computed, never asked for.
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml import YAMLError

from nextpt.base.errors import ConfigError


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values cannot change after checking."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class RunSection(Section):
    """Identity of the run."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run, also its folder's"
    )
    dir: str | None = Field(None, description="run folder; runs/NAME unless given")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of initialisation and data order")


class StageSection(Section):
    """A part of the run with a mixture and a context of its own."""

    steps: int | None = Field(
        None,
        ge=1,
        description=(
            "optimizer steps of the stage; to the end of the run unless given, in the last one only"
        ),
    )
    mixing: dict[str, float] | None = Field(
        None, description="domain -> share of samples; data.mixing unless given"
    )
    sequence_length: int | None = Field(
        None, ge=2, description="longest context, tokens; data.sequence_length unless given"
    )


class DataSection(Section):
    """What is read.

    The folder is one that `nextpt prep shards` wrote, or where copies of one are kept.
    """

    path: str = Field(
        description=(
            "dataset folder (the one with dataset.json); with remote, where copies of its files are"
            " kept"
        )
    )
    remote: str | None = Field(
        None,
        description=(
            "address of the dataset, s3://BUCKET/FOLDER or another that mosaicml-streaming knows,"
            " or a folder"
        ),
    )
    cache_limit_gib: float | None = Field(
        None,
        gt=0,
        description=(
            "most that fetched and unpacked shards may take, GiB; those unused for longest go first"
        ),
    )
    scratch: str | None = Field(
        None,
        description=(
            "folder on each machine's own disk, for notes on verified shards and unpacked ones;"
            " TMPDIR/nextpt-UID unless given"
        ),
    )
    sequence_length: int = Field(ge=2, description="inputs per row, tokens")
    mixing: dict[str, float] | None = Field(
        None,
        description=(
            "domain -> share of samples; unless given, in proportion to the rows of each domain"
        ),
    )
    stages: list[StageSection] | None = Field(
        None,
        description=(
            "stages one after another, each {steps, mixing, sequence_length}; later ones may be"
            " added while the run goes on"
        ),
    )
    repeat_caps: dict[str, float] | float | None = Field(
        None,
        description=(
            "most passes over the rows of a domain in the whole run, by domain or one number"
            " for all"
        ),
    )
    backend: Literal["native", "streaming"] = Field(
        "native", description="what reads shards: nextpt, or mosaicml-streaming's StreamingDataset"
    )
    prefetch_threads: int = Field(
        1,
        ge=1,
        le=64,
        description=(
            "threads that make batches ahead; more take more of the processor for each batch"
        ),
    )

    @model_validator(mode="after")
    def _stages_fit(self) -> DataSection:
        for number, stage in enumerate(self.stages or ()):
            key = f"data.stages.{number}"
            if stage.steps is None and stage is not self.stages[-1]:
                raise ValueError(f"{key} has no steps; only the last stage may leave them out")
            if (stage.sequence_length or 0) > self.sequence_length:
                raise ValueError(
                    f"{key}.sequence_length = {stage.sequence_length} is above data.sequence_length"
                    f" = {self.sequence_length}, the length of the rows; a stage can only shorten"
                    " the context"
                )
        if self.stages == []:
            raise ValueError("data.stages is empty; leave it out or give at least one stage")
        caps = self.repeat_caps if isinstance(self.repeat_caps, dict) else {"": self.repeat_caps}
        for name, cap in caps.items():
            if cap is not None and not (cap > 0 and math.isfinite(cap)):
                raise ValueError(
                    f"data.repeat_caps{'.' if name else ''}{name} = {cap} must be finite and > 0"
                )
        return self


class RopeScaling(Section):
    """Stretching of rotary frequencies for contexts longer than those trained on."""

    kind: Literal["linear", "llama3", "yarn"] = "linear"
    factor: float = Field(gt=1.0, description="context is stretched by this factor")
    original_max_position: int = Field(
        gt=0, description="positions of the unstretched model, tokens"
    )
    low_freq_factor: float = Field(
        1.0, gt=0, description="llama3: wavelengths above original/low are stretched fully"
    )
    high_freq_factor: float = Field(
        4.0, gt=0, description="llama3: wavelengths below original/high are kept"
    )
    beta_fast: float = Field(
        32.0, gt=0, description="yarn: rotations above which a frequency is kept"
    )
    beta_slow: float = Field(
        1.0, gt=0, description="yarn: rotations below which a frequency is stretched fully"
    )


class ModelSection(Section):
    """A pre-norm decoder-only transformer."""

    vocab_size: int = Field(
        ge=2, le=2**32 - 1, description="tokens of the vocabulary; must equal the dataset's"
    )
    depth: int = Field(ge=1, description="number of blocks")
    width: int = Field(ge=8, description="residual width")
    heads: int = Field(ge=1, description="query heads")
    kv_heads: int | None = Field(
        None, ge=1, description="key/value heads (grouped queries); heads unless given"
    )
    head_dim: int | None = Field(
        None, ge=2, description="width of a head; width/heads unless given"
    )
    ffn: Literal["swiglu", "gelu"] = "swiglu"
    ffn_width: int | None = Field(
        None,
        ge=1,
        description=(
            "hidden width of the feed-forward; unless given 8/3 (swiglu) or 4 (gelu) x width, up"
            " to 64"
        ),
    )
    max_position: int | None = Field(
        None, ge=2, description="largest position; data.sequence_length unless given"
    )
    rope_base: float = Field(10000.0, gt=1.0, description="rotary base (arXiv 2104.09864)")
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = Field(False, description="RMSNorm on queries and keys (arXiv 2302.05442)")
    tied_embeddings: bool = Field(False, description="output matrix is the embedding")
    bias: bool = Field(False, description="biases in all linear layers")
    norm_eps: float = Field(1e-5, gt=0)
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial matrices")
    logit_softcap: float | None = Field(
        None,
        gt=0,
        description="cap c of the output logits, c tanh(z / c) (Gemma 2, arXiv 2408.00118)",
    )
    sliding_window: int | None = Field(
        None, ge=1, description="keys a query sees, itself included; all unless given"
    )
    attention: str = Field("auto", description="attention implementation: auto, or one by name")
    cross_entropy: str = Field("auto", description="loss implementation: auto, or one by name")

    @property
    def kv_heads_(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head_dim_(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def ffn_width_(self) -> int:
        if self.ffn_width:
            return self.ffn_width
        multiple = 8 / 3 if self.ffn == "swiglu" else 4
        return 64 * math.ceil(multiple * self.width / 64)

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelSection:
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(
                f"model.width = {self.width} is not a multiple of model.heads = {self.heads}; "
                "change one of them or give model.head_dim"
            )
        if self.heads % self.kv_heads_:
            raise ValueError(
                f"model.heads = {self.heads} is not a multiple of model.kv_heads = {self.kv_heads}"
            )
        if self.head_dim_ % 2:
            raise ValueError(
                f"model.head_dim = {self.head_dim_} is odd; rotary embeddings need an even one"
            )
        return self


class ObjectiveSection(Section):
    """The weighted next-token loss."""

    domain_weights: dict[str, float] = Field(
        default_factory=dict,
        description="domain -> weight of its tokens in the loss; 1 unless given",
    )
    token_weights: bool = Field(
        False, description="multiply by the optional token_weights column of the shards"
    )
    z_loss: float = Field(
        0.0, ge=0, description="coefficient of log^2 Z (PaLM, arXiv 2204.02311 section 5)"
    )

    @model_validator(mode="after")
    def _weights_fit(self) -> ObjectiveSection:
        for name, weight in self.domain_weights.items():
            if not (weight >= 0 and math.isfinite(weight)):
                raise ValueError(
                    f"objective.domain_weights.{name} = {weight} must be finite and >= 0"
                )
        return self


class OptimizerSection(Section):
    """AdamW; matrices decay, vectors (norms, biases) do not."""

    lr: float = Field(gt=0, description="peak learning rate")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    decay_embeddings: bool = Field(False, description="embeddings decay too")
    grad_clip: float | None = Field(
        1.0, gt=0, description="largest global gradient norm; null: no clipping"
    )


class ScheduleSection(Section):
    """Learning rate against progress: warm-up, then cosine, or stable and decay (WSD, arXiv 2404.06395)."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    unit: Literal["steps", "tokens"] = Field("steps", description="unit of warmup and decay")
    warmup: int = Field(0, ge=0, description="linear warm-up, in units")
    decay: int | None = Field(
        None, ge=1, description="wsd: length of the final decay, in units; 20 % unless given"
    )
    final_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate / peak")


class TrainSection(Section):
    """How long, how large and on what."""

    steps: int | None = Field(None, ge=1, description="optimizer steps; or give tokens")
    tokens: int | None = Field(
        None, ge=1, description="tokens to train on, rounded up to whole steps"
    )
    stop_at: int | None = Field(
        None, ge=1, description="end after this step, the schedule still planned to the end"
    )
    global_batch_size: int = Field(ge=1, description="sequences per optimizer step over all ranks")
    micro_batch_size: int = Field(ge=1, description="sequences per forward pass of one rank")
    init_from: str | None = Field(
        None,
        description="Hugging Face folder whose weights a fresh run starts from; drawn unless given",
    )
    zero_stage: Literal[0, 1, 2, 3] = 1
    hpz_ranks: int | None = Field(
        None,
        ge=2,
        description=(
            "ZeRO-3: ranks, those of one node, that keep a second share of the weights among them,"
            " so that the backward pass gathers inside the node (ZeRO++, arXiv 2306.10209); none"
            " unless given"
        ),
    )
    precision: Literal["fp32", "bf16"] = Field("bf16", description="bf16 keeps fp32 master weights")
    activation_checkpointing: bool = Field(
        False, description="recompute each block in the backward pass"
    )
    compile: bool = Field(False, description="torch.compile each block")
    loss_gradient: Literal["precise", "small"] = Field(
        "precise",
        description=(
            "the output matrix's bf16 gradient: in one chunk or fp32 sums; or in 8 and more with"
            " fp16 sums, for less memory"
        ),
    )
    loss_logits_fp32: bool = Field(
        False,
        description="bf16 on a GPU: logits in fp32, for twice the workspace; so they are on a CPU",
    )
    loss_workspace_mib: int | None = Field(
        None,
        ge=1,
        description=(
            "memory of the loss beside its gradients, MiB; 2048 on a GPU and 256 on a CPU unless"
            " given"
        ),
    )
    log_every: int = Field(
        10, ge=1, description="steps between metrics; the only host synchronisation"
    )
    hang_seconds: float = Field(
        60.0,
        ge=1,
        description=(
            "seconds without progress after which a job ends, or ten times what the work usually"
            " takes if that is longer"
        ),
    )
    peak_tflops: float | None = Field(
        None,
        gt=0,
        description="dense peak of one device, TFLOP/s, for utilisation; known for common GPUs",
    )


class CheckpointSection(Section):
    """When state is saved, and whether a start resumes. A checkpoint is also written at the end."""

    every_steps: int | None = Field(None, ge=1)
    every_minutes: float | None = Field(None, gt=0)
    resume: Literal["auto", "never"] | int = Field(
        "auto",
        description=(
            "auto: newest complete one; a step: that one, an error if missing; never: an error"
            " if any"
        ),
    )
    grace_seconds: float = Field(
        30.0,
        gt=0,
        description=(
            "seconds from SIGTERM or SIGUSR1 to the kill (30 is Slurm's KillWait): a save that"
            " takes longer is not begun"
        ),
    )
    accept_changed_data: bool = Field(
        False, description="resume although the dataset or its order is not the same"
    )
    asynchronous: bool = Field(
        False,
        description=(
            "training goes on while a copy of the state is written; costs each rank the memory of"
            " its share, and a kill then up to twice the steps between saves"
        ),
    )
    on_failure: Literal["stop", "continue"] = Field(
        "continue",
        description=(
            "when the disk does not take a checkpoint: end with the error, or train on till the"
            " next save is due"
        ),
    )
    max_failures: int = Field(
        3, ge=1, description="failed saves in a row that end training with on_failure: continue"
    )
    mirror: str | None = Field(
        None,
        description=(
            "s3://BUCKET/RUN, another address that fsspec reaches, or a folder: checkpoints are"
            " copied there, and come from there when the run folder is lost; one address for"
            " each run"
        ),
    )
    keep_last: int | None = Field(
        3,
        ge=2,
        description=(
            "newest checkpoints to keep, older ones are removed after a save; null: keep all"
        ),
    )
    keep_every: int | None = Field(
        None, ge=1, description="keep those of every so many steps for ever"
    )
    keep_best: int | None = Field(
        None,
        ge=1,
        description="keep so many with the lowest validation loss (total, nats per token)",
    )


class GuardSection(Section):
    """Steps that must not count: a loss or gradient that is not finite, or far above the last ones (docs/reliability.md)."""

    spikes: float | None = Field(
        8.0,
        gt=0,
        description=(
            "standard deviations above the median of the last accepted steps; null: only what is"
            " not finite is bad"
        ),
    )
    window: int = Field(
        128,
        ge=4,
        le=2**16,
        description=(
            "accepted steps to compare with; no spike is looked for before there are so many"
        ),
    )
    rollback_after: int = Field(
        8,
        ge=1,
        description=(
            "bad steps in a row after which training goes back to the checkpoint before them, and"
            " passes over their data"
        ),
    )
    max_rollbacks: int = Field(
        3,
        ge=0,
        description="rollbacks without getting any further after which training ends with an error",
    )


class ValidationSection(Section):
    """Loss on held-out rows, per domain."""

    every_steps: int | None = Field(None, ge=1)
    rows: int = Field(64, ge=1, description="held-out rows per domain")


class WandbSection(Section):
    """Weights & Biases.

    The key is read from WANDB_API_KEY or `wandb login`, never from a config.
    """

    project: str = Field(
        min_length=1, description="project to log to; giving it switches this tracker on"
    )
    entity: str | None = Field(None, description="user or team; your default one unless given")
    mode: Literal["online", "offline"] = Field(
        "online", description="offline writes RUN/wandb for `wandb sync` later"
    )


class MlflowSection(Section):
    """MLflow tracking."""

    experiment: str = Field(
        min_length=1, description="experiment to log to; giving it switches this tracker on"
    )
    uri: str | None = Field(
        None,
        description=(
            "tracking server or database; the file mlflow.db beside the run folder unless given"
        ),
    )


class TrackersSection(Section):
    """Where metrics go.

    All read what happens and steer nothing; one that fails is dropped and training goes on.
    """

    jsonl: bool = Field(True, description="RUN/metrics.jsonl, which `nextpt report` reads")
    tensorboard: bool = Field(False, description="RUN/tensorboard, for `tensorboard --logdir`")
    wandb: WandbSection | None = None
    mlflow: MlflowSection | None = None


class Config(Section):
    """One run, whole."""

    run: RunSection
    data: DataSection
    model: ModelSection
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    guard: GuardSection = GuardSection()
    validation: ValidationSection = ValidationSection()
    trackers: TrackersSection = TrackersSection()

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) if self.run.dir else Path("runs") / self.run.name

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        if self.train.steps is not None:
            return self.train.steps
        return math.ceil(self.train.tokens / self.tokens_per_step)

    @property
    def last_step(self) -> int:
        return min(self.total_steps, self.train.stop_at or self.total_steps)

    @property
    def max_position(self) -> int:
        return self.model.max_position or self.data.sequence_length

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per rank and optimizer step.

        Raises ConfigError when the batch cannot be divided.
        """
        train = self.train
        if train.hpz_ranks and world_size % train.hpz_ranks:
            raise ConfigError(
                f"train.hpz_ranks = {train.hpz_ranks} does not divide the {world_size} ranks; give"
                " the ranks of one node, and as many on each"
            )
        per_pass = train.micro_batch_size * world_size
        if train.global_batch_size % per_pass:
            raise ConfigError(
                f"train.global_batch_size = {train.global_batch_size} is not a multiple of"
                f" train.micro_batch_size x ranks = {train.micro_batch_size} x {world_size} ="
                f" {per_pass}; change one of them or the number of ranks"
            )
        return train.global_batch_size // per_pass

    @model_validator(mode="after")
    def _parts_agree(self) -> Config:
        train, schedule = self.train, self.schedule
        if (train.steps is None) == (train.tokens is None):
            raise ValueError("give exactly one of train.steps and train.tokens")
        if train.zero_stage == 0 and train.precision == "bf16":
            raise ValueError(
                "train.zero_stage = 0 with train.precision = bf16 is another optimizer in"
                " DeepSpeed; use train.zero_stage=1, which is the same training with the state"
                " divided"
            )
        if train.hpz_ranks and train.zero_stage != 3:
            raise ValueError(
                f"train.hpz_ranks = {train.hpz_ranks} is for train.zero_stage = 3, which divides"
                f" the weights; leave it out with train.zero_stage = {train.zero_stage}"
            )
        if self.data.sequence_length > self.max_position:
            raise ValueError(
                f"data.sequence_length = {self.data.sequence_length} is above model.max_position"
                f" = {self.max_position}; raise the latter or shorten the sequences"
            )
        if train.global_batch_size % train.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size = {train.global_batch_size} is not a multiple of"
                f" train.micro_batch_size = {train.micro_batch_size}"
            )
        stages = self.data.stages
        if (
            stages
            and stages[-1].steps is not None
            and sum(stage.steps for stage in stages) < self.total_steps
        ):
            raise ValueError(
                f"data.stages end after {sum(stage.steps for stage in stages)} steps and the run"
                f" has {self.total_steps}; leave out the steps of the last stage, or add one"
            )
        total = self.total_steps * (self.tokens_per_step if schedule.unit == "tokens" else 1)
        if schedule.warmup > total:
            raise ValueError(
                f"schedule.warmup = {schedule.warmup} {schedule.unit} is longer than the run:"
                f" {total}"
            )
        if schedule.kind != "wsd" and schedule.decay is not None:
            raise ValueError("schedule.decay is for schedule.kind = wsd only")
        if schedule.kind == "wsd" and schedule.warmup + (schedule.decay or 0) > total:
            raise ValueError(
                f"schedule.warmup + schedule.decay = {schedule.warmup + (schedule.decay or 0)}"
                f" {schedule.unit} is longer than the run: {total}"
            )
        return self


# Keys that may differ when a run is resumed: none changes what the model learns from which data,
# but train.steps/tokens, which lengthen or shorten the run, data.stages, whose past the loader
# compares (nextpt/data/plan.py), and train.precision: the state is fp32 in either.
MAY_DIFFER = (
    "run.dir",
    "data.path",
    "data.remote",
    "data.cache_limit_gib",
    "data.scratch",
    "data.stages",
    "data.repeat_caps",
    "data.repeat_caps.",
    "data.backend",
    "data.prefetch_threads",
    "train.steps",
    "train.tokens",
    "train.stop_at",
    "train.micro_batch_size",
    "train.precision",
    "train.zero_stage",
    "train.hpz_ranks",
    "train.activation_checkpointing",
    "train.compile",
    "train.loss_",
    "train.log_every",
    "train.hang_seconds",
    "train.peak_tflops",
    "checkpoint.",
    "guard.",
    "validation.",
    "trackers.",
    "model.attention",
    "model.cross_entropy",
)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides and check everything.

    Raises ConfigError (one line: key, value, bound, nearest valid key).
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; those shipped are in configs/")
    try:
        merged = OmegaConf.load(path)
        if not OmegaConf.is_dict(merged):
            raise ConfigError(
                f"{path}: expected sections such as run:, model:, train:; the file holds a list or"
                " nothing"
            )
        for override in overrides:
            if "=" not in override:
                raise ConfigError(f"override {override!r} is not of the form key.sub=value")
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    return parse_config(values, str(path))


def parse_config(values: dict[str, Any], source: str) -> Config:
    """Check a plain dict. `source` is named in errors."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(e) for e in error.errors())) from None


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All dotted keys of a section, itself and below."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
        # Also of lists
        for kind in (*kinds, *(inner for kind in kinds for inner in getattr(kind, "__args__", ()))):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += known_keys(kind, f"{prefix}{name}.")
    return keys


def describe_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, meaning and default) of every key that holds a value."""
    rows: list[tuple[str, str]] = []
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
        below = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if below:
            rows += describe_keys(below[0], f"{prefix}{name}.")
            continue
        default = (
            "required"
            if field.is_required()
            else f"default {field.get_default(call_default_factory=True)}"
        )
        rows.append((prefix + name, f"{field.description or ''} ({default})".strip()))
    return rows


def _explain(error: Any) -> str:
    """One pydantic error as one phrase: key, value, what was expected."""
    key = ".".join(
        str(part) for part in error["loc"] if part not in ("int", "literal['auto','never']")
    )
    if error["type"] == "extra_forbidden":
        candidates = known_keys()
        near = difflib.get_close_matches(key, candidates, 1, 0.0) or candidates[:1]
        same_leaf = difflib.get_close_matches(
            key.split(".")[-1], [c.split(".")[-1] for c in candidates], 1, 0.8
        )
        if same_leaf and key.split(".")[-1] != same_leaf[0]:
            near = (
                difflib.get_close_matches(
                    key, [c for c in candidates if c.endswith(same_leaf[0])], 1, 0.0
                )
                or near
            )
        return f"unknown key {key}; the nearest is {near[0]}"
    if error["type"] == "missing":
        return f"key {key} is missing"
    message = error["msg"].removeprefix("Value error, ")
    return (
        f"{key} = {error['input']!r}: {message[0].lower()}{message[1:]}"
        if key and error["type"] != "value_error"
        else message
    )


def to_yaml(config: Config) -> str:
    """The whole config as YAML; loading it gives an equal config."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """Keys in which two configs differ, as phrases: (those a resumed run may change, those it may not)."""
    a, b = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    allowed, forbidden = [], []
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key):
            free = any(
                key == k or (k.endswith((".", "_")) and key.startswith(k)) for k in MAY_DIFFER
            )
            (allowed if free else forbidden).append(f"{key}: {a.get(key)} -> {b.get(key)}")
    return allowed, forbidden
