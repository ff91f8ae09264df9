"""Imported by the process from which stages are forked: what all of them import anyway."""

from finequant.recipes.command_line import quiet_libraries

quiet_libraries()

import finequant.finetune.trainer  # noqa: E402, F401
import finequant.quantize.checkpoint.reload  # noqa: E402, F401
