"""The documentation of the running Python as documents."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bixse.records import Document

_INSPECTION = Path(__file__).with_name("inspection.py")
# What an interpreter may need to start.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")


def documents() -> Iterator[Document]:
    """Every documented name of the standard library and every language topic, in a fixed order.

    Read in a fresh interpreter of its own, for two reasons: importing three hundred modules leaves
    marks on a long-lived driver (hooks, signal handlers, patched classes), and a driver that has
    imported Ray or torch shows classes that those have changed. Site packages and the environment
    stay out, so that the same Python always gives the same documents.

    Raises RuntimeError with the interpreter's last line when it fails.
    """
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-P", "-s", "-S", "-X", "utf8", str(_INSPECTION)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeError(f"reading the documentation of {sys.executable} failed: {reason}")
    for line in done.stdout.splitlines():
        yield Document(**json.loads(line))
