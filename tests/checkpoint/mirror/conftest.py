"""An S3 over HTTP behind a proxy that can fail, and short backoffs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nextpt.checkpoint.mirror import retry as retry_module
from tests.support.object_store import s3_server
from tests.support.proxy import Proxy, proxy


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    with s3_server("bucket") as address:
        yield address


@pytest.fixture
def link(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The connection to the store."""
    with proxy(server) as connection:
        monkeypatch.setenv("S3_ENDPOINT_URL", connection.address)
        yield connection


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_module, "INITIAL_BACKOFF", 0.02)
    monkeypatch.setattr(retry_module, "MAX_BACKOFF", 0.1)
    monkeypatch.setattr(retry_module, "MAX_ATTEMPTS", 2)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "werkzeug")  # a line per request would hide the message of a failure
