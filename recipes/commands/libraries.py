"""Imports what all stages need, in the process from which they are forked."""

import signal

# The command itself handles Ctrl-C: here it would print a traceback, in whichever import it comes.
before = signal.signal(signal.SIGINT, signal.SIG_IGN)

from finequant.recipes.command_line import quiet_libraries  # noqa: E402

quiet_libraries()

import finequant.finetune.trainer  # noqa: E402, F401
import finequant.quantize.checkpoint.reload  # noqa: E402, F401

signal.signal(signal.SIGINT, before)  # for the stages
