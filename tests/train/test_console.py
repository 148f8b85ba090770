"""Console output of training outside a terminal."""

from __future__ import annotations

import pytest

from nextpt.events import ValidationEvent
from nextpt.train.console import ConsoleListener


def test_a_validation_names_domains_and_averages(capsys: pytest.CaptureFixture[str]) -> None:
    domains = {
        "code": {"nats_per_token": 2.0, "bpb": 1.0},
        "prose": {"nats_per_token": 3.0, "bpb": 1.5},
    }
    averages = {"ema-0.99": {"domains": {"code": {"nats_per_token": 1.5, "bpb": 0.75}}}}
    listener = ConsoleListener(1, 10)
    for event in (
        ValidationEvent(2, 100, domains, domains["code"]),
        ValidationEvent(4, 200, domains, domains["code"], averages),
    ):
        listener.on_event(event)
    plain, averaged = capsys.readouterr().out.splitlines()
    metrics = "code 2.000 nats 1.000 bpb, prose 3.000 nats 1.500 bpb"
    assert plain == f"validation, step 2: {metrics}"
    assert averaged == f"validation, step 4: {metrics}; ema-0.99: code 1.500 nats 0.750 bpb"
