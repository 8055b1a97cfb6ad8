"""What `make demo` does, from scratch: videos of held-out compositions show what their prompts say."""

import json
import os
import subprocess
import sys

import pytest
from conftest import CONFIGS

CHANCE = {"colour": 1 / 4, "shape": 1 / 3, "direction": 1 / 4}


@pytest.mark.slow
def test_both_stages_from_scratch_reach_their_adherence(tmp_path):
    def lightning(*args: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        command = [sys.executable, "-m", "lightning_semgen", *args, "--trainer.enable_progress_bar=false"]
        subprocess.run(command, cwd=tmp_path, env=environment | {"PYTHONPATH": str(CONFIGS.parent)}, check=True)

    for name in ("demo_dim8", "demo_latent_dim8"):
        lightning("fit", "-c", f"{CONFIGS}/demo/{name}.yaml")
    lightning("test", "-c", "runs/demo_latent_dim8/config.yaml")
    numbers = json.loads((tmp_path / "runs/demo_latent_dim8/test/numbers.json").read_text())
    assert numbers["test/colour"] >= 0.85
    assert numbers["test/direction"] >= 0.6
    for name, chance in CHANCE.items():
        assert numbers[f"test/{name} (95 % lower bound)"] > chance
