"""Whether all ranks were started with the same: a difference would show as a hang, or as weights that drift apart."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

from data_prep.files import canonical_json
from nextpt.checkpoint.ranks import Ranks
from nextpt.config import flatten
from nextpt.errors import ConfigError


def refuse_disagreement(ranks: Ranks, facts: dict[str, Any]) -> None:
    """Raise one ConfigError on all ranks unless `facts` (nested, of JSON values) are the same on all. Collective.

    It names the rank that is not like most (on a tie: not like rank 0), the key, and both values.
    Only digests travel while all agree.
    """
    flat = flatten(facts)
    digests = ranks.gather(hashlib.sha256(canonical_json(flat).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    usual, _ = Counter(digests).most_common(1)[0]
    every = ranks.gather(flat)
    model, problems = every[digests.index(usual)], []
    for rank, (digest, found) in enumerate(zip(digests, every, strict=True)):
        if digest != usual:
            keys = [k for k in sorted(model.keys() | found.keys()) if model.get(k) != found.get(k)]
            phrases = [f"{k} = {found.get(k)!r} (elsewhere {model.get(k)!r})" for k in keys[:3]]
            problems.append(f"rank {rank}: {', '.join(phrases)}")
    more = f"; and {len(problems) - 3} ranks more" if len(problems) > 3 else ""
    raise ConfigError(
        f"the ranks were not started alike: {'; '.join(problems[:3])}{more}; "
        "start all with the same config, code and data"
    )
