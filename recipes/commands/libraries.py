"""Imports what all stages need, in the process from which they are forked."""

import signal

from finequant.recipes.command_line import quiet_libraries

before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command itself handles Ctrl-C

quiet_libraries()

import finequant.finetune.trainer  # noqa: E402, F401
import finequant.quantize.checkpoint.reload  # noqa: E402, F401

signal.signal(signal.SIGINT, before)  # for the stages
