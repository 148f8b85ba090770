"""Fixtures that many tests share.

One thread per process: two cores, and results that do not depend on their number.
"""

import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

# Triton kernels run in its interpreter; the switch must be on when triton loads
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]  # not for processes that tests start
    from tests.support import interpreter

    interpreter.start()


# No limit on the time of a random case, or of drawing it: a loaded machine exceeds any
settings.register_profile("nextpt", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nextpt")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small real dataset: code and prose of a package of the standard library, 64 tokens a row."""
    # Here and not above: the kernel tests run where only torch and pytest are installed.
    from tests.support.datasets import make_dataset

    return make_dataset(
        Path(sysconfig.get_path("stdlib")) / "email", tmp_path_factory.mktemp("dataset")
    )


# Tests that need the machine's only Slurm, bridge or Ray: one process runs them all.
ONE_PER_MACHINE = ("tests/cluster/", "tests/data_prep/test_places.py")
# Files that open datasets of mosaicml-streaming: two jobs that open theirs at the same moment may
# choose the same names for shared memory. One process runs them all.
STREAMING = (
    "tests/data/test_backends.py",
    "tests/data_prep/test_readers.py",
    "tests/data_prep/test_upload.py",
    "tests/distributed/test_data.py",
    "tests/faults/test_leftovers.py",
)
# Files that take longest, largest first. They begin first, so that no process is left alone with
# one of them at the end.
LONG = (
    "test_storm",
    "test_demo",
    "test_training",
    "test_other_optimizer",
    "test_command_line",
    "test_attention_triton",
    "test_crashes",
    "test_bad_steps",
    "test_coding",
    "test_job_context",
    "test_attention",
    "test_rollbacks",
    "test_hpz",
    "test_elastic",
    "test_pipeline",
    "test_tokenizers",
    "test_vocabulary_parallel",
    "test_cross_entropy",
    "test_cross_entropy_torch",
    "test_doctor",
    "test_sweep",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_order)


def _order(item: pytest.Item) -> int:
    if item.nodeid.startswith(ONE_PER_MACHINE):
        return -1
    return LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG)


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file in one process, for what they share."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]  # untyped
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(ONE_PER_MACHINE):
                return "machine"
            return "streaming" if nodeid.startswith(STREAMING) else nodeid.split("::")[0]

    return ByFile(config, log)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if os.environ.get("NEXTPT_TEST_NO_PROCESSES"):
        sys.addaudithook(refuse_processes)


STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system")


def refuse_processes(event: str, arguments: tuple[object, ...]) -> None:
    """Audit hook of `make test-fast`: a test that starts a process lacks its mark."""
    if event in STARTS and os.environ.get("PYTEST_CURRENT_TEST"):
        pytest.fail(f"{event} in a test without the mark `process`", pytrace=False)
