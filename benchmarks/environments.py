"""Makes an environment for each of other people's programs, and reads what the programs print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def install(where: Path, *steps: list[str]) -> None:
    """Runs the commands that fill an environment, unless the same ones have been run before.

    Raises:
        subprocess.CalledProcessError: if one fails.
    """
    record, commands = where / "installed", json.dumps(steps)
    if not record.exists() or record.read_text(encoding="utf-8") != commands:
        record.unlink(missing_ok=True)
        for step in steps:
            subprocess.run(step, check=True, capture_output=True, text=True, cwd=where)
        record.write_text(commands, encoding="utf-8")


def virtual_environment(where: Path, *commands: list[str]) -> str:
    """Makes a virtual environment, runs pip's `commands` in it, and returns its Python.

    Raises:
        subprocess.CalledProcessError: if pip fails.
    """
    python = str(where / "env" / "bin" / "python")
    steps = [[python, "-m", "pip", *command[:1], "--quiet", *command[1:]] for command in commands]
    install(where, [sys.executable, "-m", "venv", str(where / "env")], *steps)
    return python


def answer(command: list[str], where: Path) -> dict[str, Any]:
    """Runs a program in a folder, without this environment's PYTHONPATH; stderr goes to `log`.

    Returns the last line that it prints, parsed as JSON.

    Raises:
        OSError, IndexError, ValueError: if it does not start, or prints no JSON.
    """
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with (where / "log").open("w", encoding="utf-8") as log:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=clean, cwd=where
        )
    return json.loads(done.stdout.splitlines()[-1])


FAILURES = (subprocess.CalledProcessError, OSError, IndexError, ValueError)
"""The exceptions of installing and running, if a program does not do its work."""


def reason(error: Exception, where: Path) -> str:
    """Says why a program failed: the last line that it wrote to stderr."""
    log = where / "log"
    text = getattr(error, "stderr", None) or (
        log.read_text(encoding="utf-8") if log.exists() else ""
    )
    return (text.strip().splitlines() or [str(error)])[-1][:300]
