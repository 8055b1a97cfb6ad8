"""Wan's published weights: the same output as diffusers', what a stage may have anew, and the way back."""

import json
import re
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from conftest import CLIP, CONFIGS
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from encoders.published.checkpoint import MissingWeights
from lightning_semgen.commands.export import export, transformer_config
from lightning_semgen.errors import UserError
from lightning_semgen.model.condition import Condition
from lightning_semgen.model.sizes import SIZES, Size
from lightning_semgen.model.transformer import VideoTransformer
from lightning_semgen.model.wan_weights import load_wan, wan_config
from lightning_semgen.runs import load_stage
from lightning_semgen.stages.latent import LatentStage
from lightning_semgen.stages.semantic import SemanticStage

TINY = Size(dim=48, depth=2, heads=2, ffn_dim=96)


def wan(size: Size = TINY, text_dim: int = 20, freq_dim: int = 32, seed: int = 0, **options) -> WanTransformer3DModel:
    """Diffusers' network, every parameter random."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=size.heads, attention_head_dim=size.dim // size.heads, ffn_dim=size.ffn_dim,
        num_layers=size.depth, text_dim=text_dim, freq_dim=freq_dim, **options,
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def ours(size: Size = TINY, channels: int = 16, text_dim: int = 20, **options) -> VideoTransformer:
    torch.manual_seed(1)
    return VideoTransformer(channels, text_dim, size, **{"rotary_rate": 4.0, "freq_dim": 32} | options)


def without_gradient(tokens: int, words: int) -> str:
    """Pattern of parameters on which nothing depends: the softmax of a single token or word is 1."""
    alone = [r"attn1\.(to|norm)_[qk]"] * (tokens == 1) + [r"attn2\.(to|norm)_[qk]", r"norm2\."] * (words == 1)
    return "|".join(alone) or r"(?!)"


def assert_same(
    model: WanTransformer3DModel, mine: VideoTransformer, shape: tuple, words: int, close: float, key_bias: float
) -> None:
    """Outputs and gradients to `close` of their standard deviation, those of the bias of text keys to `key_bias`."""
    torch.manual_seed(2)
    dtype = mine.proj_out.weight.dtype
    z, t = torch.randn(2, 16, *shape, dtype=dtype), torch.tensor([0.3, 0.9])
    text = torch.randn(2, words, mine.condition_embedder.text_embedder.linear_1.in_features, dtype=dtype)
    seconds = tuple(k / 4 for k in range(shape[0]))  # Wan's latents at 16 fps, four frames each
    reference = model(z, t * 1000, text, return_dict=False)[0]
    output = mine(z, t, Condition(text), seconds)
    assert output.dtype == dtype and apart(output, reference) <= min(close, 5e-5)
    loss = torch.randn_like(reference)
    (output * loss).sum().backward()
    (reference * loss).sum().backward()
    theirs = {name: p.grad for name, p in model.named_parameters()}
    gradients = {name: p.grad for name, p in mine.named_parameters() if p.grad is not None}
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        if not re.search(without_gradient(tokens=z[0, 0].numel() // 4, words=words), name):
            # What moves all keys alike hardly moves a softmax: little but rounding.
            bound = key_bias if re.search(r"attn2\.to_k\.bias", name) else close
            assert apart(gradient, theirs[name]) <= bound, name


def apart(x: torch.Tensor, reference: torch.Tensor) -> float:
    return ((x - reference).abs().max() / reference.std()).item()


def assert_same_in_double(model: WanTransformer3DModel, mine: VideoTransformer, shape: tuple, words: int) -> None:
    with patch.object(torch.Tensor, "float", torch.Tensor.double):  # what diffusers turns to float32 to be precise
        double = WanTransformer3DModel.from_config(model.config).eval().double()
        double.load_state_dict(model.state_dict())
        assert_same(double, mine.double(), shape, words, close=1e-11, key_bias=1e-11)


@pytest.mark.parametrize("size", [TINY, Size(dim=72, depth=3, heads=3, ffn_dim=130)], ids=["2x24", "3x24"])
@pytest.mark.parametrize("shape", [(3, 4, 6), (5, 6, 14), (1, 2, 2)])
@pytest.mark.parametrize("words", [1, 7])
def test_loaded_it_is_wan(size, shape, words, tmp_path):
    model = wan(size)
    model.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    assert len(list(tmp_path.rglob("*.safetensors"))) > 1
    mine = ours(size, semantic_dim=8)
    load_wan(mine, str(tmp_path))
    assert_same(model, mine, shape, words, close=5e-5, key_bias=1e-4)
    mine.zero_grad()
    assert_same_in_double(model, mine, shape, words)


@pytest.mark.slow
def test_at_the_width_of_the_published_weights_it_is_wan(tmp_path):
    size = replace(SIZES["1.3B"], depth=2)
    model = wan(size, 4096, 256)
    model.save_pretrained(tmp_path, max_shard_size="200MB")
    mine = ours(size, text_dim=4096, freq_dim=256)
    load_wan(mine, str(tmp_path))
    assert_same(model, mine, (3, 6, 10), 512, close=5e-4, key_bias=5e-3)
    mine.zero_grad()
    assert_same_in_double(model, mine, (3, 6, 10), 512)


@pytest.mark.parametrize("name", ["1.3B", "14B"])
def test_the_published_configs_are_the_rows_of_those_sizes(name, tmp_path):
    size = SIZES[name]
    with torch.device("meta"):
        model = WanTransformer3DModel(num_attention_heads=size.heads, ffn_dim=size.ffn_dim, num_layers=size.depth)
        mine = VideoTransformer(16, 4096, size)
    theirs = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert theirs == {key: tensor.shape for key, tensor in mine.state_dict().items()}


def saved(folder, **options) -> dict[str, torch.Tensor]:
    model = wan(**options)
    model.save_pretrained(folder)
    return model.state_dict()


def test_layers_of_another_shape_are_new_and_the_rest_is_loaded(tmp_path, caplog):
    state = saved(tmp_path)
    mine = ours(channels=64, text_dim=12, patch=(1, 1, 1))  # its output layer happens to have Wan's shape
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    with caplog.at_level("INFO"):
        load_wan(mine, str(tmp_path))
    assert "new: condition_embedder.text_embedder.linear_1, patch_embedding, proj_out" in caplog.text
    assert f"{len(state) - 6} tensors with" in caplog.text
    new = {
        f"{layer}.{kind}"
        for layer in ("patch_embedding", "proj_out", "condition_embedder.text_embedder.linear_1")
        for kind in ("weight", "bias")
    }
    for name, tensor in mine.state_dict().items():
        assert torch.equal(tensor, before[name] if name in new else state[name]), name
    assert mine.proj_out.weight.abs().max() == 0


def test_a_new_semantic_token_is_what_an_empty_latent_is(tmp_path):
    saved(tmp_path)
    mine = ours(semantic_dim=8)
    load_wan(mine, str(tmp_path))
    empty = mine.patch_embedding(torch.zeros(1, 16, 1, 2, 2)).flatten()
    torch.testing.assert_close(mine.semantic_embedding(torch.randn(5, 8)), empty.expand(5, -1))
    other = ours(channels=8, semantic_dim=8)  # whose input layer is new: nothing is known of an empty latent
    load_wan(other, str(tmp_path))
    assert other.semantic_embedding.weight.abs().min() > 0


def test_absolute_time_is_new_and_nothing_at_first(tmp_path, caplog):
    saved(tmp_path)
    mine = ours(absolute_time=True)
    with caplog.at_level("INFO"):
        load_wan(mine, str(tmp_path))
    assert "new: time_embedding" in caplog.text
    assert mine.time_embedding.weight.abs().max() == 0


@pytest.mark.parametrize("dim", [8, 4])
def test_a_semantic_embedding_is_loaded_where_it_fits(dim, tmp_path):
    trained, mine = ours(semantic_dim=dim), ours(semantic_dim=8)
    torch.nn.init.normal_(trained.patch_embedding.bias)
    save_file(trained.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(wan_config(trained)))
    load_wan(mine, str(tmp_path))
    state = trained.state_dict()
    same = [name for name, tensor in mine.state_dict().items() if tensor.equal(state[name])]
    assert len(state) - len(same) == (0 if dim == 8 else 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"blocks.0.attn2.add_k_proj.weight": torch.ones(1)}, "unknown blocks.0.attn2.add_k_proj.weight"),
        (lambda s: {k: v for k, v in s.items() if k != "proj_out.bias"}, "lacks proj_out.bias"),
        (lambda s: {k: v for k, v in s.items() if k != "patch_embedding.weight"}, "lacks patch_embedding.weight"),
        (lambda s: s | {"blocks.1.norm2.bias": torch.ones(7)}, r"another shape of blocks.1.norm2.bias \(7,\)"),
    ],
)
def test_anything_unexpected_is_an_error(change, message, tmp_path):
    save_file(change(saved(tmp_path)), tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=message):
        load_wan(ours(), str(tmp_path))


def test_another_size_or_architecture_is_named_with_both_values(tmp_path):
    saved(tmp_path)
    with pytest.raises(UserError, match="num_layers is 2, not 4.*ffn_dim is 96, not 384"):
        load_wan(ours(SIZES["toy"]), str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    toy = {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 384}
    for change, said in (
        ({"freq_dim": 64}, "freq_dim is 64, not 32"),
        ({"eps": 1e-5}, "eps is 1e-05"),
        (toy, "to toy"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=said):
            load_wan(ours(), str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="There is no config.json"):
        load_wan(ours(), str(tmp_path))


def test_missing_weights_come_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    command = "hf download Wan-AI/Wan2.1-T2V-14B-Diffusers --include 'transformer/*'"
    with pytest.raises(MissingWeights, match=re.escape(command)):
        load_wan(ours(), "Wan-AI/Wan2.1-T2V-14B-Diffusers")
    wan().save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    missing = sorted((tmp_path / "transformer").glob("*.safetensors"))[-1]
    missing.unlink()
    with pytest.raises(MissingWeights, match=f"transformer/{missing.name}"):
        load_wan(ours(), str(tmp_path))


# Stages and runs


def toy_weights(folder, **options) -> dict[str, torch.Tensor]:
    return saved(folder, size=SIZES["toy"], text_dim=128, freq_dim=256, **options)


@pytest.mark.parametrize("cls", [SemanticStage, LatentStage])
def test_a_stage_counts_positions_as_the_weights_do(cls):
    assert cls(clip=CLIP, init_from="later").ema.transformer.rotary_rate == 4.0
    assert cls(clip=CLIP, init_from="later", rotary_rate=6.0).ema.transformer.rotary_rate == 6.0


def test_a_fresh_fit_starts_from_the_weights_and_a_resumed_one_from_its_own(workspace, lightning):
    state = toy_weights(workspace / "wan")
    options = ("--model.init_from=wan", "--model.encoder=none", "--data.encoded=null", "--trainer.limit_val_batches=0")
    fit = ("fit", "-c", f"{CONFIGS}/latent_dim8.yaml", *options)
    lightning(*fit, "--trainer.max_steps=1", "--model.lr=0")
    made = load_stage("runs/latent_dim8")
    for network in (made.generator, made.ema):
        for name, tensor in network.transformer.state_dict().items():
            if tensor.shape == state[name].shape and "patch_embedding" not in name and "proj_out" not in name:
                assert torch.equal(tensor, state[name]), name
    for path in (workspace / "wan").iterdir():
        path.unlink()
    lightning(*fit, "--trainer.max_steps=2", "--ckpt_path=last")


def test_an_exported_run_opens_in_diffusers_and_starts_another(workspace, lightning, fails, monkeypatch):
    options = ("--model.encoder=none", "--data.encoded=null", "--trainer.limit_val_batches=0", "--trainer.max_steps=1")
    lightning("fit", "-c", f"{CONFIGS}/latent_dim8.yaml", *options)
    lightning("export", "runs/latent_dim8", "exported", small=False)
    assert sorted(p.name for p in (workspace / "exported").iterdir()) == ["config.yaml", "text_encoder", "transformer"]
    stage = load_stage("runs/latent_dim8")
    monkeypatch.setattr(WanTransformer3DModel, "_keep_in_fp32_modules", None)  # which needs accelerate
    model = WanTransformer3DModel.from_pretrained("exported", subfolder="transformer").eval()
    z, t, text = torch.randn(2, *stage.latent_shape), torch.tensor([0.3, 0.9]), torch.randn(2, 24, 128)
    with torch.no_grad():
        reference = model(z, t * 1000, text, return_dict=False)[0]
        output = stage.ema.transformer(z, t, Condition(text), stage.seconds)
    assert output.std() > 0 and (output - reference).abs().max() / reference.std() <= 5e-5
    assert "exported is already there" in fails("export", "runs/latent_dim8", "exported", small=False)
    again = ("fit", "-c", f"{CONFIGS}/latent_dim8.yaml", *options, "--model.init_from=exported", "--model.lr=0")
    again += ("--trainer.default_root_dir=second",)
    assert "set model.rotary_rate to 6" in fails(*again)
    lightning(*again, "--model.rotary_rate=6")
    second = load_stage("second").ema.transformer.state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in stage.ema.transformer.state_dict().items())


def test_attention_in_windows_is_exported_as_ours():
    for num_frames, name in ((49, "WanTransformer3DModel"), (97, "VideoTransformer")):  # 2 s and 4 s
        clip = replace(CLIP, num_frames=num_frames)
        config = transformer_config(LatentStage(clip=clip, encoder="none", window_seconds=2.5))
        assert config["_class_name"] == name


def test_what_diffusers_cannot_say_is_exported_as_ours(workspace, lightning):
    lightning("fit", "-c", f"{CONFIGS}/dim8.yaml", "--trainer.max_steps=2", "--model.compressor_steps=1")
    export("runs/dim8", "exported")
    assert {p.name for p in (workspace / "exported").iterdir()} >= {"transformer", "text_encoder", "compressor"}
    config = json.loads((workspace / "exported/transformer/config.json").read_text())
    assert config["_class_name"] == "VideoTransformer" and config["rotary_rate"] == 6.0
