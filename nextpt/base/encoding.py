"""Text encoding of the process: UTF-8 whatever the locale says."""

from __future__ import annotations

import io
import os
import sys

VARIABLE = "PYTHONUTF8"


def ensure_utf8() -> None:
    """Start this program again in Python's UTF-8 mode where the locale has another encoding.

    Paths and texts that are not ASCII could not be printed or written otherwise. The process keeps
    its id; processes that it starts inherit the mode.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get(VARIABLE) != "1":
        os.environ[VARIABLE] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        # A file name that is no UTF-8, or a terminal of another encoding, is no reason to end
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
