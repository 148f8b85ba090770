"""Collectives of small JSON values over a named group of ranks, and votes on their failures.

Values travel as JSON because torch's own object collectives pickle. Every function that is marked
"Collective" must be called by all ranks of the group, in the same order.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from nextpt.base import errors
from nextpt.base.errors import (
    EXIT_USER_ERROR,
    ConfigError,
    UserError,
    describe_os_error,
    same_on_all_ranks,
)
from nextpt.base.files import canonical_json

T = TypeVar("T")

# What gloo, NCCL and torch's store say when the process at the other end of a connection is gone.
_PEER_LOST = re.compile(
    r"connection (was )?(reset|closed|refused)|connection closed by peer|broken pipe"
    r"|socket closed|remote process exited"
    r"|(read|write|send|recv)\w* error .*(reset|pipe|peer)|ncclRemoteError",
    re.IGNORECASE,
)


class RankGroup:
    """Ranks that exchange small values on the CPU, over one gloo process group.

    The group is used for everything but training: it neither waits for the device nor competes
    with it.

    Args:
        process_group: A gloo group that this process belongs to; None for a process by itself.

    Attributes:
        rank: Rank of this process within the group.
        world_size: Number of ranks of the group.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self.process_group = process_group
        self.rank = 0 if process_group is None else dist.get_rank(process_group)
        self.world_size = 1 if process_group is None else dist.get_world_size(process_group)

    @classmethod
    def world(cls) -> RankGroup:
        """A new group of all ranks; of this process alone where torch is not distributed.

        Collective.
        """
        return cls(dist.new_group(backend="gloo") if dist.is_initialized() else None)

    def duplicate(self) -> RankGroup:
        """A second group of the same ranks, for use by another thread. Collective."""
        if self.process_group is None:
            return RankGroup(None)
        ranks = dist.get_process_group_ranks(self.process_group)
        # Only the ranks of a subgroup take part in making its duplicate.
        partial = len(ranks) < dist.get_world_size()
        return RankGroup(dist.new_group(ranks, backend="gloo", use_local_synchronization=partial))

    def all_gather(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in order of rank, on every rank. Collective."""
        if self.process_group is None:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([data.numel()]), group=self.process_group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: data.numel()] = data
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(parts, padded, group=self.process_group)
        return [
            json.loads(part[: int(size)].numpy().tobytes())
            for part, size in zip(parts, sizes, strict=True)
        ]

    def broadcast(self, value: Any) -> Any:
        """The JSON value of rank 0, on every rank. Collective."""
        return self.all_gather(value if self.rank == 0 else None)[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Collective."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> list[bool]:
        """`any` for each of several flags, in one exchange. Collective."""
        if self.process_group is None:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.process_group)
        return [bool(vote) for vote in votes.numpy()]


def run_on_all_ranks(group: RankGroup, action: Callable[[], T]) -> T:
    """Run an action on every rank; when it fails on one, all ranks raise its error. Collective.

    So no rank waits in a later collective for one that failed. While nothing fails it costs one
    exchange of a few bytes between hosts, and no device waits for it.

    Args:
        group: The ranks that take part.
        action: What each rank does. Its result stays on its rank.

    Returns:
        The result of this rank's own action.

    Raises:
        UserError: Of the class and exit code of the first rank that failed with a UserError or an
            OSError. Other exceptions are defects of the program: they are raised where they occur.
    """
    return run_on_all_ranks_or_stop(group, action, lambda: False)[0]


def run_on_all_ranks_or_stop(
    group: RankGroup, action: Callable[[], T], stopping: Callable[[], bool]
) -> tuple[T, bool]:
    """As `run_on_all_ranks`, with a vote on stopping in the same exchange. Collective.

    Args:
        group: The ranks that take part.
        action: What each rank does.
        stopping: Whether this rank was asked to stop; called after the action.

    Returns:
        The result of this rank's own action, and whether `stopping` was true on any rank.
    """
    result: Any = None
    failure = None
    try:
        result = action()
    except (UserError, OSError) as error:
        failure = _pack(error)
    failed, stop = group.any_of(failure is not None, stopping())
    if failed:
        rank, packed = next((r, f) for r, f in enumerate(group.all_gather(failure)) if f)
        raise _unpack(packed, prefix="" if rank == 0 else f"rank {rank}: ")
    return result, stop


def run_on_rank_0(group: RankGroup, action: Callable[[], T]) -> T:
    """Run an action on rank 0 alone; all ranks get its result, or raise its error. Collective.

    Args:
        group: The ranks that take part.
        action: What rank 0 does. Its result must be a JSON value.

    Returns:
        Rank 0's result, on every rank.

    Raises:
        UserError: Of the class and exit code of rank 0's UserError or OSError.
    """
    result: Any = None
    failure = None
    if group.rank == 0:
        try:
            result = action()
        except (UserError, OSError) as error:
            failure = _pack(error)
    result, failure = group.broadcast([result, failure])
    if failure:
        raise _unpack(failure)
    return cast(T, result)


def check_same_on_all_ranks(group: RankGroup, facts: dict[str, Any]) -> None:
    """Check that all ranks were started with the same facts. Collective.

    A difference would show as a hang, or as weights that drift apart. Only digests travel while
    all agree.

    Args:
        group: The ranks that take part.
        facts: JSON values by dotted key.

    Raises:
        ConfigError: On all ranks. It names the rank that differs from the majority (on a tie: from
            rank 0), the key, and both values.
    """
    digests = group.all_gather(hashlib.sha256(canonical_json(facts).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    majority, _ = Counter(digests).most_common(1)[0]
    facts_of_ranks = group.all_gather(facts)
    expected, problems = facts_of_ranks[digests.index(majority)], []
    for rank, (digest, own) in enumerate(zip(digests, facts_of_ranks, strict=True)):
        if digest != majority:
            keys = [
                k for k in sorted(expected.keys() | own.keys()) if expected.get(k) != own.get(k)
            ]
            phrases = [f"{k} = {own.get(k)!r} (elsewhere {expected.get(k)!r})" for k in keys[:3]]
            problems.append(f"rank {rank}: {', '.join(phrases)}")
    more = f"; and {len(problems) - 3} ranks more" if len(problems) > 3 else ""
    raise ConfigError(
        f"the ranks were not started alike: {'; '.join(problems[:3])}{more}; "
        "start all with the same config, code and data"
    )


def lost_peer(error: BaseException) -> str | None:
    """First line of a collective's error when another rank is gone; None for any other error."""
    text = str(error)
    if isinstance(error, RuntimeError) and _PEER_LOST.search(text):
        return text.strip().splitlines()[0]
    return None


def _pack(error: UserError | OSError) -> list[Any]:
    """Class, message and exit code of an error, as JSON."""
    if isinstance(error, UserError):
        return [type(error).__name__, str(error), error.exit_code]
    return [UserError.__name__, describe_os_error(error), EXIT_USER_ERROR]


def _unpack(packed: list[Any], prefix: str = "") -> UserError:
    """The error that `_pack` described; the same on all ranks, so rank 0 prints it."""
    name, message, exit_code = packed
    kind = getattr(errors, name, UserError)
    # A class with arguments of its own is represented by the nearest one that takes a message.
    while "__init__" in vars(kind):
        kind = kind.__base__
    error: UserError = kind(prefix + message)
    error.exit_code = exit_code
    return same_on_all_ranks(error)
