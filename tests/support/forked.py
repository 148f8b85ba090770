"""Forked children: run a function in a process that may be killed without this one."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable

import torch

LONGEST = 600  # seconds; a hanging child prints its stack and ends with 1


def run_in_child(action: Callable[[], object]) -> int:
    """Run in a forked process.

    Returns its exit code, negative for a signal, 70 for an exception, which is printed.
    """
    pid = os.fork()
    if pid == 0:
        code = 70
        faulthandler.dump_traceback_later(LONGEST, exit=True, file=sys.__stderr__.fileno())
        signal.alarm(0)  # pytest-timeout's handler raises
        # Makes its pool of threads anew after the fork; two threads at once would trip over that
        torch.set_num_threads(1)
        # That library's threads did not survive the fork
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
