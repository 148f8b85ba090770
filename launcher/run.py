"""What `deepspeed`, `srun` and `nextpt train` start on every rank: train one config.

deepspeed launcher/run.py --config configs/demo.yaml train.steps=50 model.depth=4
"""

import argparse
import errno
import os
import signal
import sys
import time
import traceback

# The repository root, not this folder, must be importable; must come before every other import.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from nextpt.base.errors import (  # noqa: E402
    EXIT_CRASHED,
    EXIT_REQUEUE,
    EXIT_USER_ERROR,
    TrainingStopped,
    UserError,
)
from nextpt.base.processes import command_line, exit_with_ancestors, parent_pid  # noqa: E402

CODES = """exit codes: 0 finished; 1 crashed; 2 a mistake to mend first; 4 another job works in the run folder; 65 no valid
checkpoint where there were some; 75 told to stop (SIGTERM, SIGUSR1), the same command resumes; 76 a rank or the network did not answer, the same command resumes. RUN/exit.json
has the code, the reason and the step, also where a launcher loses the code. See docs/reliability.md."""


def main(arguments: list[str] | None = None) -> int:
    """Train; returns the exit code, see nextpt/base/errors.py."""
    parser = argparse.ArgumentParser(
        prog="deepspeed launcher/run.py",
        description="Train the run that a YAML file describes. The same command again resumes it.",
        epilog=(
            "example: deepspeed --num_gpus 8 launcher/run.py --config configs/124m.yaml"
            " train.steps=1000\n\n"
        )
        + CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see configs/")
    parser.add_argument(
        "--local_rank", type=int, default=None, help="given by the deepspeed launcher"
    )
    parser.add_argument(
        "--traceback", action="store_true", help="show the Python traceback of an error"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override a key of the file"
    )
    options = parser.parse_args(arguments)
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    # Until training listens: there is nothing to save yet
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: os._exit(EXIT_REQUEUE))
    exit_with_ancestors(launchers(), _orphaned)
    try:
        from nextpt.config import load_config

        config = load_config(options.config, options.overrides)
        from nextpt.observe.trackers import check_trackers, open_trackers
        from nextpt.train.run import run_training

        check_trackers(config)
        run_training(config, open_trackers)
    except UserError as error:
        if options.traceback:
            raise
        if int(os.environ.get("RANK", "0")) == 0 or error.every_rank:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:  # the launcher ends all ranks when one ends: rank 0 must have spoken by then
            _linger(error.exit_code)
        return error.exit_code
    except TrainingStopped as stopped:
        if int(os.environ.get("RANK", "0")) == 0:
            print(stopped, file=sys.stderr, flush=True)
        return stopped.exit_code
    except OSError as error:
        if options.traceback or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            traceback.print_exc()
            return EXIT_CRASHED
        print(
            f"error: no space left for {error.filename or 'the run folder'}; free some and start"
            " the same command again, it resumes",
            file=sys.stderr,
            flush=True,
        )
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # not left to the interpreter, whose teardown can hang (below)
        from nextpt.base.collective import lost_peer

        lost = lost_peer(error)
        if lost is None or options.traceback:
            traceback.print_exc()
        # Launchers end all ranks when one ends, and pass on the code of that one: the rank that was
        # lost is to be it
        if lost:
            rank = os.environ.get("RANK", "0")
            print(
                f"error: rank {rank} lost another rank ({lost}); the same command resumes",
                file=sys.stderr,
                flush=True,
            )
            _linger(EXIT_CRASHED)
        return EXIT_CRASHED
    return 0


def _linger(code: int) -> None:
    """Let another rank end first.

    The launcher's signal that follows is no wish of anybody's: it changes no exit code.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: os._exit(code))
    time.sleep(3)


def launchers() -> list[int]:
    """Processes above this one that exist for this job alone: when one of them is gone, nobody waits for this rank.

    A process started by hand, or with nohup, may outlive its parent: only ranks that a launcher
    started may not.
    """
    if "RANK" not in os.environ:
        return []
    found = [os.getppid()]
    above = parent_pid(found[0]) if "deepspeed" in command_line(found[0]) else None
    # Its runner, or on another host the shell that pdsh had started
    if above and "deepspeed" in command_line(above):
        found.append(above)
        above = parent_pid(above)
    # pdsh's connection; a person's own has a shell of his between
    if above and command_line(above).startswith("sshd"):
        found.append(above)
    supervisor = os.environ.get("NEXTPT_SUPERVISOR")
    return found + ([int(supervisor)] if supervisor else [])


def _orphaned(pid: int) -> None:
    print(
        f"error: the process {pid} that started this rank is gone; the same command resumes",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_CRASHED)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: interpreter teardown after gloo can hang on a peer that has gone.
    os._exit(code)
