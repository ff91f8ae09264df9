"""Tokens of the environment reach neither a file of a run nor its output."""

from __future__ import annotations

import pytest

PLANTED = {
    "HF_TOKEN": "hf_plantedPLANTEDplantedPLANTED0123456",
    "HUGGING_FACE_HUB_TOKEN": "hf_anotherPLANTEDplantedPLANTED012345",
    "WANDB_API_KEY": "planted0123456789abcdef0123456789abcdef01",
    "AWS_SECRET_ACCESS_KEY": "planted/aws/secret/0123456789",
    "MY_PRIVATE_SETTING": "planted-and-nobodys-business",
}


@pytest.mark.slow
def test_a_token_of_the_environment_is_in_no_file_and_no_output(
    recipe_file, tmp_path, here, stages_here, monkeypatch
):
    printed = ""
    for name, secret in PLANTED.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    license_ = "publish.license=mit"
    for arguments in (["run"], ["publish", "--dry-run"], ["run", "train.learning_rate=1e30"]):
        command, *overrides = arguments
        done = here(command, str(recipe_file), license_, *overrides)
        printed += done.stdout + done.stderr
        assert done.returncode == (2 if "1e30" in str(overrides) else 0), done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {tmp_path / "run" / "report.json", tmp_path / "run" / "publish" / "README.md"} < {*files}
    assert len(files) > 30
    content = printed.encode() + b"".join(path.read_bytes() for path in files)
    for secret in PLANTED.values():
        assert secret.encode() not in content
