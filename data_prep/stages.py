"""Stages of a preparation, in order: their items, when an item is done, and how to do it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from data_prep.choice import choice_path, chosen_tokenizer, make_tokenizer
from data_prep.duplicates import Duplicates, duplicates_path, find_duplicates, partitions
from data_prep.encode import encode_unit, tokens_path
from data_prep.finish import finish, is_finished
from data_prep.group import pack_group, packed_path
from data_prep.layout import Layout, layout_path, make_layout
from data_prep.plan import Plan
from data_prep.streaming_compat import import_streaming
from data_prep.tokenizer import Tokenizer
from data_prep.work import Stage, run_stage
from nextpt.base.errors import UserError


def stages(plan: Plan) -> Iterator[Stage]:
    """Yield each stage when the one before it is done, as items depend on earlier results."""
    work, units = plan.spec.work, plan.units
    yield Stage(
        "tokenizer",
        [1],
        lambda i: choice_path(work).exists(),
        lambda i, advance: make_tokenizer(plan),
    )
    yield Stage(
        "tokenize",
        [unit.size for unit in units],
        lambda i: tokens_path(work, i).exists(),
        lambda i, advance: encode_unit(plan, units[i], _tokenizer(plan), advance),
        [unit.text for unit in units],
    )
    count = partitions(work, len(units))
    yield Stage(
        "duplicates",
        [len(units)] * count,
        lambda i: duplicates_path(work, i).exists(),
        lambda i, advance: find_duplicates(work, len(units), i, count, advance),
    )
    yield Stage(
        "layout",
        [1],
        lambda i: layout_path(work).exists(),
        lambda i, advance: make_layout(plan, Duplicates(work, count)),
    )
    layout, duplicates = Layout.load(work), _duplicates(plan.sha256, work, count)
    yield Stage(
        "pack",
        [group.tokens for group in layout.groups],
        lambda i: packed_path(work, i).exists(),
        lambda i, advance: pack_group(
            plan,
            layout.groups[i],
            layout.domains.index(layout.groups[i].domain),
            _tokenizer(plan),
            duplicates,
            advance,
        ),
    )
    yield Stage(
        "finish",
        [1],
        lambda i: is_finished(plan),
        lambda i, advance: finish(
            plan,
            layout,
            _tokenizer(plan),
            duplicates,
            time.time() - (work / "plan.json").stat().st_mtime,
        ),
    )


def run_worker(work: Path, worker: int, workers: int) -> None:
    """Take part in a preparation until it is finished; the same on every host.

    Raises:
        DataPrepError: When it cannot be finished.
    """
    plan = Plan.load(work)
    try:
        for stage in stages(plan):
            # The import takes seconds, and packing needs it
            run_stage(stage, work, worker, workers, idle=import_streaming)
    except (FileNotFoundError, UserError):
        # If it is finished, another worker has removed WORK while this one used it
        if not is_finished(plan):
            raise


def _tokenizer(plan: Plan) -> Tokenizer:
    return chosen_tokenizer(plan.sha256, plan.spec.work)


@lru_cache(maxsize=1)
def _duplicates(plan_sha256: str, work: Path, count: int) -> Duplicates:
    return Duplicates(work, count)
