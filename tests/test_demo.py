"""The demo reaches its numbers: both stages from scratch, on prompts of compositions that were never trained on."""

import json
import subprocess
import sys

import pytest
from conftest import CONFIGS

from data.toy.world import SHAPES


@pytest.mark.slow
def test_the_demo_shows_what_its_prompts_say(tmp_path):
    def lightning(*args: str) -> None:  # as a user has it, with all cores
        subprocess.run([sys.executable, "-m", "lightning_semgen", *args], cwd=tmp_path, check=True)

    lightning("fit", "-c", f"{CONFIGS}/demo/demo_dim8.yaml")
    lightning("fit", "-c", f"{CONFIGS}/demo/demo_latent_dim8.yaml")
    lightning("test", "-c", "runs/demo_latent_dim8/config.yaml")
    numbers = json.loads((tmp_path / "runs/demo_latent_dim8/test/numbers.json").read_text())
    assert numbers["test/colour"] >= 0.85
    assert numbers["test/direction"] >= 0.60
    assert numbers["test/shape (95 % lower bound)"] > 1 / len(SHAPES)
