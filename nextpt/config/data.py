"""Config section `data`: dataset, mixture of domains, stages and reading."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import model_validator

from nextpt.config.section import Section, key


class StageSection(Section):
    """A stage of the run with its own mixture and context length."""

    steps: int | None = key(
        None,
        ge=1,
        unit="optimizer steps",
        description="length of the stage; only the last one may leave it out: the rest of the run",
    )
    mixing: dict[str, float] | None = key(
        None, description="domain -> share of the sequences; data.mixing unless set"
    )
    sequence_length: int | None = key(
        None,
        ge=2,
        unit="tokens",
        description="longest context; data.sequence_length unless set",
    )


class DataSection(Section):
    """The dataset that `nextpt prep shards` wrote, and the order in which it is read."""

    path: str = key(
        is_path=True,
        may_change=True,
        description="dataset folder (with dataset.json); with data.remote, folder of the copies",
        aliases=("dataset", "dataset_path", "data_path", "data_dir", "local", "train_data"),
    )
    remote: str | None = key(
        None,
        is_path=True,
        may_change=True,
        description=(
            "URI of the dataset: s3://BUCKET/FOLDER, another that mosaicml-streaming reads, or a"
            " folder"
        ),
        aliases=("data_remote", "remote_path"),
    )
    cache_limit_gib: float | None = key(
        None,
        gt=0,
        unit="GiB",
        may_change=True,
        description=(
            "limit on fetched and unpacked shards on disk; the least recently used are deleted"
            " first"
        ),
        aliases=("cache_limit", "cache_size"),
    )
    scratch: str | None = key(
        None,
        is_path=True,
        may_change=True,
        description=(
            "folder on each machine's own disk for records of verified shards and for unpacked"
            " shards; TMPDIR/nextpt-UID unless set"
        ),
        aliases=("cache_dir", "scratch_dir"),
    )
    sequence_length: int = key(
        ge=2,
        unit="tokens",
        description="inputs per sequence",
        aliases=(
            "seq_len",
            "seq_length",
            "block_size",
            "max_seq_len",
            "max_seq_length",
            "max_sequence_length",
            "context_length",
            "context_size",
            "n_ctx",
        ),
    )
    mixing: dict[str, float] | None = key(
        None,
        description="domain -> share of the sequences; proportional to their number unless set",
        aliases=("mixture", "weights", "domain_mixture", "proportions", "mix"),
    )
    stages: list[StageSection] | None = key(
        None,
        may_change=True,
        description=(
            "consecutive stages, each {steps, mixing, sequence_length}; later ones may be added"
            " to a run that has begun"
        ),
        aliases=("curriculum", "phases"),
    )
    max_epochs: dict[str, float] | float | None = key(
        None,
        unit="epochs",
        may_change=True,
        deprecated=("repeat_caps",),
        description="most epochs over a domain in the whole run, by domain or one number for all",
        aliases=("max_repetition_ratio", "max_repeats"),
    )
    backend: Literal["native", "streaming"] = key(
        "native",
        may_change=True,
        description="shard reader: nextpt's, or mosaicml-streaming's StreamingDataset",
    )
    verify: Literal["job", "machine"] = key(
        "job",
        may_change=True,
        description=(
            "when the hash of a shard is verified: job: at its first use in each job; machine: once"
            " on each machine, as long as its size and times stay the same"
        ),
    )
    prefetch_threads: int = key(
        1,
        ge=1,
        le=64,
        may_change=True,
        description="threads that build batches ahead; each batch costs more CPU time with more",
        aliases=("num_workers", "workers", "dataloader_num_workers", "prefetch_factor"),
    )

    @model_validator(mode="after")
    def _check_stages(self) -> DataSection:
        if self.stages is None:
            return self
        if not self.stages:
            raise ValueError("data.stages is empty; leave it out or give at least one stage")
        for number, stage in enumerate(self.stages):
            name = f"data.stages.{number}"
            if stage.steps is None and stage is not self.stages[-1]:
                raise ValueError(f"{name} has no steps; only the last stage may leave them out")
            if (stage.sequence_length or 0) > self.sequence_length:
                raise ValueError(
                    f"{name}.sequence_length = {stage.sequence_length} is above"
                    f" data.sequence_length = {self.sequence_length}, the length of the sequences"
                    " of the dataset; a stage can only shorten the context"
                )
        return self

    @model_validator(mode="after")
    def _check_max_epochs(self) -> DataSection:
        limits = self.max_epochs if isinstance(self.max_epochs, dict) else {"": self.max_epochs}
        for domain, limit in limits.items():
            if limit is not None and not (limit > 0 and math.isfinite(limit)):
                raise ValueError(
                    f"data.max_epochs{'.' if domain else ''}{domain} = {limit} must be finite and"
                    " > 0"
                )
        return self
