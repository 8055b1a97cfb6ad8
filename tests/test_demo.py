"""The demo from an empty folder to its numbers, about ten minutes."""

import json
import subprocess
import sys

import pytest
from conftest import CONFIGS


@pytest.mark.slow
def test_the_demo_shows_what_prompts_of_unseen_compositions_say(tmp_path):
    for command in (
        ["fit", "-c", CONFIGS / "demo/demo_dim8.yaml"],
        ["fit", "-c", CONFIGS / "demo/demo_latent_dim8.yaml"],
        ["test", "-c", "runs/demo_latent_dim8/config.yaml"],
    ):
        subprocess.run([sys.executable, "-m", "lightning_semgen", *command], cwd=tmp_path, check=True)
    numbers = json.loads((tmp_path / "runs/demo_latent_dim8/test/numbers.json").read_text())
    assert numbers["test/colour"] >= 0.85
    assert numbers["test/direction"] >= 0.60
    assert numbers["test/shape (95 % lower bound)"] > 1 / 3
    assert len(list((tmp_path / "runs/demo_latent_dim8/test").glob("*.mp4"))) == 192
