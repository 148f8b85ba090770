"""Entry point of each rank, for `deepspeed`, `srun` and `nextpt train`: train one config.

deepspeed launcher/run.py --config configs/demo.yaml train.steps=50 model.depth=4
"""

import argparse
import os
import signal
import sys
import time
import traceback
from contextlib import suppress

# The repository root, not this folder, must be importable: before any other import of nextpt.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from nextpt.base.encoding import ensure_utf8  # noqa: E402
from nextpt.base.errors import (  # noqa: E402
    DISK_FULL,
    EXIT_CRASHED,
    EXIT_REQUEUE,
    EXIT_USER_ERROR,
    NOT_WRITABLE,
    TrainingStopped,
    UserError,
    describe_os_error,
    print_warnings_to_users,
)
from nextpt.base.processes import command_line, exit_with_ancestors, parent_pid  # noqa: E402

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LINGER_SECONDS = 3.0
EXIT_INTERRUPTED = 130
EPILOG = """example: deepspeed --num_gpus 8 launcher/run.py --config configs/124m.yaml train.steps=9

exit codes: 0 finished; 1 crashed; 2 user error; 4 another job uses the run folder; 65 no valid
checkpoint among those that exist; 75 stopped by SIGTERM or SIGUSR1, the same command resumes; 76 a
rank or the network did not answer, the same command resumes. RUN/exit.json has the code, the reason
and the step, also where a launcher loses the code. See docs/reliability.md."""


def main(arguments: list[str] | None = None) -> int:
    """Train one rank; returns the exit code, see nextpt/base/errors.py."""
    options = _parse(arguments)
    print_warnings_to_users()
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    # Until training handles signals there is nothing to save.
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: os._exit(EXIT_REQUEUE))
    exit_with_ancestors(launchers(), _exit_orphaned)
    try:
        _train(options.config, options.overrides)
    except UserError as error:
        if options.traceback:
            raise
        if _rank() == 0 or error.every_rank:
            _print_error(str(error))
        else:  # the launcher ends all ranks when one exits: rank 0 must have printed the error
            _linger(error.exit_code)
        return error.exit_code
    except TrainingStopped as stopped:
        if _rank() == 0:
            print(stopped, file=sys.stderr, flush=True)
        return stopped.exit_code
    except OSError as error:
        if options.traceback or error.errno not in DISK_FULL | NOT_WRITABLE:
            traceback.print_exc()
            return EXIT_CRASHED
        _print_error(f"{describe_os_error(error)}; the same command resumes")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:  # not left to the interpreter, whose teardown can hang (see below)
        return _report_crash(error, options.traceback)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="deepspeed launcher/run.py",
        description="Train the run of a YAML file. The same command again resumes it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see configs/")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    parser.add_argument("--traceback", action="store_true", help="print tracebacks of user errors")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="config keys that override the file's"
    )
    return parser.parse_args(arguments)


def _train(config_file: str, overrides: list[str]) -> None:
    from nextpt.config import load_config

    config = load_config(config_file, overrides)
    # After the config, whose errors should not wait for the import of torch.
    from nextpt.observe.trackers import check_trackers, open_trackers
    from nextpt.train.run import run_training

    check_trackers(config)
    run_training(config, open_trackers)


def _report_crash(error: Exception, with_traceback: bool) -> int:
    """Print a crash; a rank that only lost another rank exits later than that rank.

    Launchers end all ranks when one exits, and pass its exit code on: it should be the code of the
    rank that failed first.
    """
    from nextpt.base.collective import lost_peer

    peer = lost_peer(error)
    if peer is None or with_traceback:
        traceback.print_exc()
    if peer:
        _print_error(f"rank {_rank()} lost another rank ({peer}); the same command resumes")
        _linger(EXIT_CRASHED)
    return EXIT_CRASHED


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def _linger(code: int) -> None:
    """Let another rank exit first; the launcher's signal that follows changes no exit code."""
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: os._exit(code))
    time.sleep(LINGER_SECONDS)


def launchers() -> list[int]:
    """Return pids of the launcher processes above this rank, parent first.

    When one of them has ended, nobody waits for this rank. A process that was started by hand, or
    with nohup, may outlive its parent: only ranks that a launcher started have any.
    """
    if "RANK" not in os.environ:
        return []
    pids = [os.getppid()]
    above = parent_pid(pids[0]) if "deepspeed" in command_line(pids[0]) else None
    # deepspeed's runner, or on another host the shell that pdsh started
    if above and "deepspeed" in command_line(above):
        pids.append(above)
        above = parent_pid(above)
    # pdsh's connection; a user's own session has a login shell between
    if above and command_line(above).startswith("sshd"):
        pids.append(above)
    supervisor = os.environ.get("NEXTPT_SUPERVISOR")
    return pids + ([int(supervisor)] if supervisor else [])


def _exit_orphaned(pid: int) -> None:
    _print_error(f"process {pid}, which started this rank, has ended; the same command resumes")
    os._exit(EXIT_CRASHED)


if __name__ == "__main__":
    ensure_utf8()
    code = main()
    with suppress(OSError):  # a full disk under the log changes no exit code
        sys.stdout.flush()
        sys.stderr.flush()
    # Not sys.exit: interpreter teardown after gloo can hang on a peer that has exited.
    os._exit(code)
