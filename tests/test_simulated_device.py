"""Every stage on a device that refuses to mix with the CPU: `on_simulated_device.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).with_name("on_simulated_device.py")


@pytest.mark.slow
def test_every_stage_computes_without_mixing_devices():
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    process = subprocess.run(
        command, env=environment, cwd=TESTS.parents[1], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout
    assert "skipped" not in process.stdout
