"""Global order of sequences: a pure function of seed, plan, shard sizes and position.

Positions 0, 1, 2, ... are the sequences in the order in which training reads them, whatever the
number of ranks, the micro-batch size or the number of reading threads; those only slice it.

    position g  ->  its stage s; block (g - start_s) div BLOCK of that stage, place within the block
    block       ->  sequences of each domain in it and before it, in integers (mixture.py); their
                    places in the block are a permutation drawn from (seed, stage, block)
    draw k of a domain, counted over all stages  ->  sequence (domain_order.py)

No arrow depends on any other position: nothing has to be replayed.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from nextpt.data.domain_order import DomainOrder
from nextpt.data.mixture import BLOCK, Mixture
from nextpt.data.permutation import permutation
from nextpt.data.plan import DataPlan

_BLOCK_STREAM = 0  # random stream of the blocks; domain d has stream 1 + d

_Int64s = npt.NDArray[np.int64]


class GlobalOrder:
    """Order over all domains.

    Args:
        plan: Seed and stages.
        shard_sizes: Per domain the sequences of each shard, int [shards].
    """

    def __init__(self, plan: DataPlan, shard_sizes: list[npt.NDArray[np.int64]]) -> None:
        self.plan = plan
        self.domains = [DomainOrder(sizes, plan.seed, 1 + d) for d, sizes in enumerate(shard_sizes)]
        self._mixtures = [Mixture(stage.weights) for stage in plan.stages]
        self._block = lru_cache(maxsize=8)(self._draw_block)
        # Sequences of each domain before each stage; stages seldom end with a block.
        self._counts_before_stage = [np.zeros(len(shard_sizes), np.int64)]
        for number, (stage, following) in enumerate(pairwise(plan.stages)):
            self._counts_before_stage.append(
                self._counts_within(number, following.start - stage.start)
            )

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(domain, sequence of that domain) at a position >= 0."""
        domains, sequences = self.locate(position, position + 1)
        return int(domains[0]), int(sequences[0])

    def locate(self, first: int, stop: int) -> tuple[_Int64s, _Int64s]:
        """(domains, sequences of them) at positions first..stop-1, int64 [stop - first] each."""
        domains, draws = self.draws(first, stop)
        return domains, self.sequences(domains, draws)

    def sequences(self, domains: _Int64s, draws: _Int64s) -> _Int64s:
        """Sequences, int64 [n], of what `draws` returned for rising positions."""
        sequences = np.empty(len(domains), np.int64)
        for domain in np.unique(domains):
            positions = np.flatnonzero(domains == domain)
            sequences[positions] = self.domains[domain].sequences(draws[positions])
        return sequences

    def draws(self, first: int, stop: int) -> tuple[_Int64s, _Int64s]:
        """(domains, draws of them) at positions first..stop-1, int64 [stop - first] each."""
        domains: list[_Int64s] = []
        draws: list[_Int64s] = []
        while first < stop:
            number = self.plan.stage_at(first)
            start, end = self.plan.stages[number].start, self._end(number)
            block, offset = divmod(first - start, BLOCK)
            until = min(stop, start + (block + 1) * BLOCK, stop if end is None else end)
            block_domains, block_draws = self._block(number, block)
            domains.append(block_domains[offset : offset + until - first])
            draws.append(block_draws[offset : offset + until - first])
            first = until
        return np.concatenate(domains), np.concatenate(draws)

    def domain_counts(self, position: int) -> list[int]:
        """Sequences of each domain at all positions before this one."""
        number = self.plan.stage_at(position)
        counts = self._counts_within(number, position - self.plan.stages[number].start)
        return [int(count) for count in counts]

    def sequence_length(self, position: int) -> int:
        """Longest context of the stage of a position, tokens."""
        return self.plan.stages[self.plan.stage_at(position)].sequence_length

    def _end(self, stage: int) -> int | None:
        return self.plan.stages[stage + 1].start if stage + 1 < len(self.plan.stages) else None

    def _counts_within(self, stage: int, length: int) -> _Int64s:
        """Sequences of each domain before the `length`-th position of a stage, int64 [domains]."""
        block, offset = divmod(length, BLOCK)
        counts = self._counts_before_stage[stage] + self._mixtures[stage].counts_before(block)
        partial = np.bincount(self._block(stage, block)[0][:offset], minlength=len(counts))
        return counts + partial

    def _draw_block(self, stage: int, block: int) -> tuple[_Int64s, _Int64s]:
        """(domain, draw of it) of each place of a block, int64 [BLOCK] each."""
        mixture = self._mixtures[stage]
        counts = mixture.counts(block)
        # Place p of the block has slot shuffled[p]; slots are sorted by domain.
        shuffled = permutation(BLOCK, self.plan.seed, _BLOCK_STREAM, (stage, block, 0))
        domains = np.repeat(np.arange(len(counts)), counts)[shuffled]
        by_domain = np.argsort(domains, kind="stable")
        draws = np.empty(BLOCK, np.int64)
        first_draws = self._counts_before_stage[stage] + mixture.counts_before(block)
        first_slots = np.cumsum(counts) - counts
        draws[by_domain] = np.repeat(first_draws - first_slots, counts) + np.arange(BLOCK)
        return domains, draws
