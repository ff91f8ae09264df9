"""Imported by the process from which stages are forked: what all of them import anyway."""

import signal

from finequant.recipes.command_line import quiet_libraries

before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command to obey

quiet_libraries()

import finequant.finetune.trainer  # noqa: E402, F401
import finequant.quantize.checkpoint.reload  # noqa: E402, F401

signal.signal(signal.SIGINT, before)  # in the stages
