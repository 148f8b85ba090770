"""What `deepspeed`, `srun` and `nextpt train` start on every rank: train one config.

    deepspeed launcher/run.py --config configs/demo.yaml train.steps=50 model.depth=4
"""

import argparse
import errno
import os
import sys
import time

# The repository root, not this folder, must be importable; must come before every other import.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from nextpt.errors import UserError  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Train; returns the exit code: 0 done, 2 a mistake of the user's, or what the error says (errors.py)."""
    parser = argparse.ArgumentParser(
        prog="deepspeed launcher/run.py",
        description="Train the run that a YAML file describes. The same command again resumes it.",
        epilog="example: deepspeed --num_gpus 8 launcher/run.py --config configs/124m.yaml train.steps=1000",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see configs/")
    parser.add_argument("--local_rank", type=int, default=None, help="given by the deepspeed launcher")
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the file")
    options = parser.parse_args(arguments)
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
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
        else:
            time.sleep(3)  # the launcher kills all ranks when one ends: rank 0 must have spoken by then
        return error.exit_code
    except OSError as error:
        if options.traceback or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: no space left for {error.filename or 'the run folder'}; free some and start the same command again,"
              " it resumes", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: interpreter teardown after gloo can hang on a peer that has gone.
    os._exit(code)
