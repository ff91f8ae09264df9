"""accelerate launch --config_file deepspeed_zero3.yaml zero3.py RECIPE: trains, but on the CPU.

DeepSpeed runs on a CPU, too, with gloo; `finequant train` refuses that, as it only costs time.
"""

from __future__ import annotations

from finequant.finetune import arguments
from finequant.finetune.train import main

arguments._refuse_launch = lambda on_cpu: None
main()
