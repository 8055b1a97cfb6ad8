"""The paper's setting: built at its real size on the meta device, and run small from small weights of every part."""

import pytest
import torch
import yaml
from conftest import CONFIGS, save_text_encoder
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from lightning.pytorch.strategies import StrategyRegistry

from lightning_semgen.model.sizes import SIZES
from lightning_semgen.trainer_cli import run

PAPER = sorted((CONFIGS / "paper").glob("*.yaml"))
RANDOM = ("--model.encoder_options.weights=random", "--trainer.strategy=auto")
SMALL_CLIPS = (
    "--data.train_shards=shards/toy/train-*.tar", "--data.val_shards=shards/toy/heldout-*.tar",
    "--data.num_frames=49", "--data.height=48", "--data.width=48",
)  # fmt: skip
SMALL_ENCODER = {"width": 64, "depth": 3, "heads": 4, "mlp": 100, "out": 96, "full_attention": [1]}
pytestmark = pytest.mark.filterwarnings("ignore:The encoder has random weights", "ignore:The weights of")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Wan's pipeline where the configs name it, its parts small, but as wide where they meet."""
    here = tmp_path_factory.mktemp("weights")
    folder = here / "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    save_text_encoder(folder, 4096, ("tokenizer", "text_encoder"))
    AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1).save_pretrained(folder / "vae")
    size = SIZES["toy"]
    WanTransformer3DModel(
        num_attention_heads=size.heads, attention_head_dim=size.dim // size.heads, num_layers=size.depth,
        ffn_dim=size.ffn_dim,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    return here / "Wan-AI"


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_it_builds_at_its_real_size(path, pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Wan-AI").symlink_to(pipeline)
    with torch.device("meta"):
        stage = run(["-c", str(path), *RANDOM], execute=False).model
    settings = yaml.safe_load(path.read_text())
    assert settings["trainer"]["strategy"] in StrategyRegistry.available_strategies()
    assert f"lightning fit -c configs/paper/{path.name}" in path.read_text()
    parameters = sum(p.numel() for p in stage.ema.parameters())
    assert parameters == pytest.approx(1.42e9, rel=0.01) and all(p.is_meta for p in stage.parameters())
    grid = stage.space.grid
    steps = 48 if path.stem == "long" else 4
    assert (len(grid.seconds), grid.height, grid.width, stage.space.encoder.dim) == (steps, 17, 30, 2048)
    if hasattr(stage, "latent_shape"):
        assert stage.latent_shape == (16, 361 if path.stem == "long" else 31, 60, 104)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dim8", "dim_none"])
def test_both_stages_run_small_in_the_papers_order(name, pipeline, workspace, lightning):
    (workspace / "Wan-AI").symlink_to(pipeline)
    options = [f"--model.encoder_options.{option}={value}" for option, value in SMALL_ENCODER.items()]
    for config in (f"latent_{name}", name):
        lightning(
            "fit", "-c", f"{CONFIGS}/paper/{config}.yaml", *RANDOM, *options, *SMALL_CLIPS, "--model.size=toy",
            "--trainer.max_steps=2", "--model.compressor_steps=1", "--trainer.precision=32",
        )  # fmt: skip
    assert (workspace / f"runs/paper/{name}/checkpoints/last.ckpt").is_file()
