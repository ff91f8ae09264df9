"""`python -m finequant.recipes.commands.launcher MODULE ...`: starts processes as torchrun or
accelerate does, and ends with the exit code of the one that failed first.

On their own, these launchers exit with 1 and print forty lines after the one that says why.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Iterable
from runpy import run_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


def main(arguments: list[str]) -> None:
    """Runs a launcher's module.

    arguments: the module, such as torch.distributed.run, and its arguments.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)
    sys.argv = arguments
    try:
        run_module(arguments[0], run_name="__main__", alter_sys=True)
        code = 0
    except ChildFailedError as error:
        code = _first_exit_code(error.failures.values())
    except subprocess.CalledProcessError as error:  # from accelerate with one process
        code = error.returncode
    except SignalException as stop:
        code = -stop.sigval
    except KeyboardInterrupt:  # from accelerate with one process
        code = -signal.SIGINT
    sys.exit(code if code >= 0 else 128 - code)


def _first_exit_code(failures: Iterable[ProcessFailure]) -> int:
    """Returns the exit code of the failure that caused the others: if a process is killed, others
    may fail within the same second, because they lost it."""
    return min(failures, key=lambda it: (it.timestamp, it.exitcode != -signal.SIGKILL)).exitcode


if __name__ == "__main__":
    main(sys.argv[1:])
