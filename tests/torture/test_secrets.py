"""Tokens that are in the environment reach no file of a run, and nothing that it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLANTED = {
    "HF_TOKEN": "hf_plantedPLANTEDplantedPLANTED0123456",
    "HUGGING_FACE_HUB_TOKEN": "hf_anotherPLANTEDplantedPLANTED012345",
    "WANDB_API_KEY": "planted0123456789abcdef0123456789abcdef01",
    "AWS_SECRET_ACCESS_KEY": "planted/aws/secret/0123456789",
    "MY_PRIVATE_SETTING": "planted-and-nobodys-business",
}


@pytest.mark.slow
def test_a_planted_token_is_nowhere(recipe_file, tmp_path):
    printed = ""
    for arguments in (["run"], ["publish", "--dry-run"], ["run", "train.learning_rate=1e30"]):
        command, *overrides = arguments
        done = subprocess.run(
            [sys.executable, "-m", "finequant.recipes.run", command, str(recipe_file), *overrides],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | PLANTED | {"HF_HOME": str(tmp_path / "hf")},
            timeout=300,
        )
        printed += done.stdout + done.stderr
        assert "publish" not in arguments or done.returncode in (0, 2)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert tmp_path / "run" / "report.json" in files
    assert len(files) > 30
    content = printed.encode() + b"".join(path.read_bytes() for path in files)
    for secret in PLANTED.values():
        assert secret.encode() not in content
