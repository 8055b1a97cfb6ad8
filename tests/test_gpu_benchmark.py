"""`make gpu` works: its parts run small on the CPU; those with compiled blocks take too long here."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

PARTS = ["attention", "step", "fit", "encoders", "vae"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="measures, where there is a GPU")
def test_every_part_runs_and_writes_its_figures(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path), "--parts", *PARTS]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found) == PARTS and not [name for name, part in found.items() if "error" in part]
    assert found["step"]["ratio"] > 0 and found["fit"]["planned memory_gb"] > 0
    assert all(value > 0 for name, value in found["encoders"].items() if name.startswith(("vjepa2", "4ds", "qwen")))
