"""The global order of rows: a pure function of (seed, plan, rows per shard, position).

Positions 0, 1, 2, ... are the samples in the order in which training sees them, whatever the number
of ranks, the micro-batch size or the number of reading threads; those only slice it.

    position g  ->  stage s that holds it, block (g - start_s) div BLOCK of that stage, place within
    the block block       ->  how many samples of each domain it holds and all before it held
    (mixture.py), in integers; which
                    places they have is a permutation drawn from (seed, stage, block)
    k-th sample that the domain ever gives, over all stages  ->  row (passes.py)

Every arrow is found without looking at any other position: nothing has to be replayed.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from nextpt.data.domain_order import DomainOrder
from nextpt.data.mixture import BLOCK, Mixture
from nextpt.data.permutation import permutation
from nextpt.data.plan import DataPlan

BLOCKS = 0  # stream of the draws for blocks; domain d has stream 1 + d


class GlobalOrder:
    """GlobalOrder over domains; `samples[d]`: int [shards], rows in each shard of domain d."""

    def __init__(self, plan: DataPlan, samples: list[np.ndarray]) -> None:
        self.plan = plan
        self.domains = [DomainOrder(counts, plan.seed, 1 + d) for d, counts in enumerate(samples)]
        self._mixtures = [Mixture(stage.weights) for stage in plan.stages]
        self._block = lru_cache(maxsize=8)(self._draw_block)
        # Samples of each domain before each stage; stages seldom end with a block.
        self._bases = [np.zeros(len(samples), np.int64)]
        for number, (stage, following) in enumerate(zip(plan.stages, plan.stages[1:])):
            self._bases.append(self._given(number, following.start - stage.start))

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(domain, row of that domain) at a position >= 0."""
        domains, rows = self.locate(position, position + 1)
        return int(domains[0]), int(rows[0])

    def locate(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(domain int64, row of it int64) of positions first..stop-1."""
        domains, nths = self.nths(first, stop)
        return domains, self.rows(domains, nths)

    def rows(self, domains: np.ndarray, nths: np.ndarray) -> np.ndarray:
        """int64 [n]: rows that belong to what `nths` returned, for positions that rise."""
        rows = np.empty(len(domains), np.int64)
        for domain in np.unique(domains):
            places = np.flatnonzero(domains == domain)
            rows[places] = self.domains[domain].rows(nths[places])
        return rows

    def nths(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(domain int64, how many samples that domain gave before int64) of positions first..stop-1."""
        parts = []
        while first < stop:
            number = self.plan.stage_at(first)
            start, end = self.plan.stages[number].start, self._end(number)
            block, place = divmod(first - start, BLOCK)
            upto = min(stop, start + (block + 1) * BLOCK, stop if end is None else end)
            domains, nths = self._block(number, block)
            parts.append(
                (domains[place : place + upto - first], nths[place : place + upto - first])
            )
            first = upto
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]

    def given(self, position: int) -> list[int]:
        """Samples of each domain at all positions before this one."""
        number = self.plan.stage_at(position)
        return self._given(number, position - self.plan.stages[number].start).tolist()

    def sequence_length(self, position: int) -> int:
        """Longest context of the stage that a position belongs to, tokens."""
        return self.plan.stages[self.plan.stage_at(position)].sequence_length

    def _end(self, stage: int) -> int | None:
        return self.plan.stages[stage + 1].start if stage + 1 < len(self.plan.stages) else None

    def _given(self, stage: int, samples: int) -> np.ndarray:
        """int64 [domains]: samples of each before the `samples`-th of a stage."""
        block, place = divmod(samples, BLOCK)
        whole = self._bases[stage] + self._mixtures[stage].before(block)
        return whole + np.bincount(self._block(stage, block)[0][:place], minlength=len(whole))

    def _draw_block(self, stage: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(domain of each place, how many samples that domain gave before it), int64 [BLOCK] each."""
        mixture = self._mixtures[stage]
        amounts = mixture.amounts(block)
        # Place p of the block has slot shuffled[p]; slots are sorted by domain.
        shuffled = permutation(BLOCK, self.plan.seed, BLOCKS, (stage, block, 0))
        domains = np.repeat(np.arange(len(amounts)), amounts)[shuffled]
        by_domain = np.argsort(domains, kind="stable")
        nths = np.empty(BLOCK, np.int64)
        firsts = self._bases[stage] + mixture.before(block) - (np.cumsum(amounts) - amounts)
        nths[by_domain] = np.repeat(firsts, amounts) + np.arange(BLOCK)
        return domains, nths
