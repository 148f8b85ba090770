"""Output folders that appear as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from nextpt.base.errors import CheckpointError
from nextpt.base.files import temporary_path
from nextpt.base.json_files import sync


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a staging folder; it becomes `output` when the block ends without an error.

    It is synced and renamed then, and removed otherwise.

    Raises:
        CheckpointError: `output` exists, its parent does not, or the disk refuses.
    """
    parent = output.absolute().parent
    if os.path.lexists(output):
        raise CheckpointError(f"{output} exists already; remove it or name another --output")
    if not parent.is_dir():
        raise CheckpointError(f"folder {parent} for the output does not exist")
    staging = temporary_path(parent / output.name)
    try:
        staging.mkdir()
        yield staging
        for path in staging.iterdir():
            if path.is_file():  # safetensors makes files that only their owner may read
                path.chmod(staging.stat().st_mode & 0o666)
            sync(path)
        sync(staging)
        os.rename(staging, output)
        sync(parent)
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk only in the text of its error
        full = "No space left" in str(error)
        what = (
            "no space left on the device"
            if full
            else getattr(error, "strerror", None) or str(error)
        )
        raise CheckpointError(
            f"{output} cannot be written: {what}; nothing of it was left behind"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
