"""The published families: exactly the authors' features, from every published layout, or an error that says why."""

import argparse
import json
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import CONFIGS, SHARED
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from data.clip import Clip
from encoders import ENCODERS, build_encoder
from encoders.published.resize import KERNELS, resize
from lightning_semgen.errors import UserError

PARITY = Path(os.environ.get("SEMGEN_PARITY", SHARED / "parity"))
TINY = {"width": 48, "depth": 3, "heads": 4, "mlp": 100, "size": 64}
FAMILIES = {
    "qwen2_5_vl_3b": {"width": 64, "depth": 3, "heads": 4, "mlp": 100, "out": 96, "full_attention": [1]},
    "vjepa2_large": TINY,
    "videomae2_base": TINY,
    "4ds_b": TINY,
    "timm/vit_tiny_patch16_224": {},
}
pytestmark = pytest.mark.filterwarnings("ignore:The encoder has random weights", "ignore:The weights of")


def tiny(name: str, weights: str = "random", **options):
    return build_encoder(name, weights, **FAMILIES[name] | options)


def clip(frames: int = 4, height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (2, frames, 3, height, width), generator=torch.Generator().manual_seed(seed)).byte()


def assert_exact(features: torch.Tensor, reference: torch.Tensor) -> None:
    """In float32, relative to the spread of the features."""
    apart = (features.reshape(reference.shape) - reference).abs().max() / reference.std()
    print(f"features: max|d| / std {apart:.1e}")  # pytest -rP shows it
    assert apart <= 5e-5


@torch.no_grad()
def randomise(network: nn.Module, stem_scale: float = 1e-3) -> nn.Module:
    """Every parameter random, nothing hidden by zeros and ones; tiny patches make a wrong epsilon show."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        parameter.normal_(0, 0.2 if parameter.ndim > 1 else 0.5, generator=generator)
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.add_(1)
        if "patch_embed" in name:
            parameter.mul_(stem_scale)
    return network.eval()


# The fixtures: the authors' own code wrote weights and features


def fixture(name: str) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = PARITY / name
    if not folder.is_dir():
        pytest.skip(f"no encoder fixtures in {PARITY}: name their folder as SEMGEN_PARITY")
    with np.load(folder / "oracle.npz", allow_pickle=False) as oracle:
        tensors = {key: torch.from_numpy(oracle[key]) for key in oracle.files}
    return folder, tensors | {"frames": tensors["frames_u8"].permute(0, 3, 1, 2)[None]}


def check_preprocessing(encoder, oracle: dict, pixels: torch.Tensor) -> None:
    apart = (encoder.preprocess(oracle["frames"]) - pixels).abs().mean()
    print(f"pixels: mean|d| {apart:.1e}")
    assert apart < 0.01


@pytest.mark.parametrize("source", ["encoder", "target_encoder"])
def test_vjepa2_is_the_authors(source):
    folder, oracle = fixture("vjepa2_tiny")
    pixels, reference = oracle["pixels"].movedim(1, 2), oracle[f"tokens_{source.removesuffix('_encoder')}"]
    sizes = {"width": 104, "depth": 3, "heads": 4, "mlp": 453, "size": 64}
    options = {"source": source, "resolution": "authors"}
    encoder = build_encoder("vjepa2_large", str(folder / "checkpoint.pt"), **options, **sizes)
    assert_exact(encoder.features(pixels), reference)
    check_preprocessing(encoder, oracle, pixels)


def test_vjepa2_from_the_hub_layout_takes_its_sizes_from_config_json():
    folder, oracle = fixture("vjepa2_tiny")
    encoder = build_encoder("vjepa2_giant", str(folder / "hf"))
    assert_exact(encoder.features(oracle["pixels"].movedim(1, 2)), oracle["tokens_encoder"])


def test_videomae2_is_the_authors():
    folder, oracle = fixture("vmae2_finetune")
    pixels = oracle["pixels"].movedim(1, 2)
    encoder = build_encoder("videomae2_base", str(folder), resolution="authors")
    assert_exact(encoder.features(pixels), oracle["tokens_norm"])
    check_preprocessing(encoder, oracle, pixels)
    for layer in range(4):
        encoder = build_encoder("videomae2_base", str(folder), final_norm=False, layer=layer)
        assert_exact(encoder.features(pixels), oracle[f"hidden_{layer}"])


def test_4ds_is_the_authors():
    folder, oracle = fixture("fourds_tiny")
    pixels = oracle["pixels"].permute(0, 1, 4, 2, 3)
    sizes = {"width": 48, "depth": 6, "mlp": 200, "heads": 3, "frames": 8, "size": 64}
    encoder = build_encoder("4ds_b", str(folder / "checkpoint.npz"), resolution="authors", **sizes)
    assert_exact(encoder.features(pixels), oracle[f"aux_{oracle['readout_id']}"])
    check_preprocessing(encoder, oracle, pixels)
    last = build_encoder("4ds_b", str(folder / "checkpoint.npz"), layer=6, **sizes)
    assert_exact(last.features(pixels), oracle["after_last"])


def test_qwen_is_the_authors():
    folder, oracle = fixture("qwen_tiny")
    steps, height, width = oracle["grid_thw"].tolist()
    pixels = rearrange(
        oracle["pixel_values"], "(t h w p q) (c u a b) -> (t u) c (h p a) (w q b)",
        t=steps, h=height // 2, w=width // 2, p=2, q=2, c=3, u=2, a=14,
    )[None]  # fmt: skip
    encoder = build_encoder("qwen2_5_vl_7b", str(folder), resolution="authors", min_pixels=32 * 28 * 28)
    assert_exact(encoder.features(pixels), oracle["merged"])
    check_preprocessing(encoder, oracle, pixels)
    assert_exact(build_encoder("qwen2_5_vl_7b", str(folder), layer=4).features(pixels), oracle["premerge"])


def test_a_file_with_several_encoders_needs_the_right_source(tmp_path):
    state = {"module.backbone.patch_embed.proj.weight": torch.ones(1)}
    torch.save({"encoder": state, "ema_encoder": state}, tmp_path / "vjepa21.pt")
    with pytest.raises(UserError, match="encoder.module.backbone., ema_encoder.*source 'target_encoder'"):
        tiny("vjepa2_large", str(tmp_path))


# Other cases, against the libraries' own classes with all weights random


def transformers_vjepa2(monkeypatch, height: int, width: int) -> nn.Module:
    from transformers import VJEPA2Config, VJEPA2Model
    from transformers.models.vjepa2 import modeling_vjepa2

    def positions(self, x, masks=None):  # of the real grid; the library's are those of a square
        ids = torch.arange(x.shape[1])
        rows, columns = height // 16, width // 16
        return ids // (rows * columns), ids // columns % rows, ids % columns

    monkeypatch.setattr(modeling_vjepa2.VJEPA2RopeAttention, "get_position_ids", positions)
    config = VJEPA2Config(
        crop_size=64, hidden_size=48, num_attention_heads=4, num_hidden_layers=3, mlp_ratio=100 / 48,
        pred_hidden_size=12, pred_num_attention_heads=1, pred_num_hidden_layers=1,
    )  # fmt: skip
    return randomise(VJEPA2Model(config))


@torch.no_grad()
def test_vjepa2_off_the_square(monkeypatch, tmp_path):
    model = transformers_vjepa2(monkeypatch, 48, 80)
    model.save_pretrained(tmp_path)
    pixels = torch.randn(1, 6, 3, 48, 80)
    encoder = build_encoder("vjepa2_large", str(tmp_path))
    reference = model(pixel_values_videos=pixels, skip_predictor=True).last_hidden_state
    assert_exact(encoder.features(pixels), reference)
    interpolated = build_encoder("vjepa2_large", str(tmp_path), positions="interpolated")
    assert (interpolated.features(pixels).reshape(reference.shape) - reference).abs().max() > 0.1
    half = build_encoder("vjepa2_large", str(tmp_path), dtype="bfloat16").features(pixels)
    assert half.dtype == torch.float32 and F.cosine_similarity(half.flatten(1, 3), reference, dim=-1).mean() > 0.99


def test_vjepa2_interpolated_positions_are_the_integers_on_the_trained_square():
    square, wide = clip(4, 64, 64), clip(4, 64, 96)
    integer, interpolated = (tiny("vjepa2_large", positions=p) for p in ("integer", "interpolated"))
    torch.testing.assert_close(integer(square), interpolated(square), atol=1e-4, rtol=1e-4)
    rotary = interpolated.rotary((1, 4, 7), torch.device("cpu"))
    torch.testing.assert_close(rotary[0][:7:6], integer.rotary((1, 4, 4), torch.device("cpu"))[0][:4:3])
    assert not torch.equal(integer(wide), interpolated(wide))


def authors_videomae2(model: nn.Module, prefix: str, norm: str) -> dict[str, torch.Tensor]:
    """transformers' names to the authors'."""
    names = {
        "embeddings.patch_embeddings.projection": "patch_embed.proj", "encoder.layer": "blocks",
        "attention.output.dense": "attn.proj", "layernorm_before": "norm1", "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2", "attention.attention.query.bias": "attn.q_bias",
        "attention.attention.value.bias": "attn.v_bias", "fc_norm": norm,
    }  # fmt: skip
    state, qkv = {}, {}
    for name, tensor in model.state_dict().items():
        if match := re.match(r"encoder.layer.(\d+).attention.attention.(query|key|value).weight", name):
            qkv.setdefault(match[1], {})[match[2]] = tensor
            continue
        for theirs, authors in names.items():
            name = name.replace(theirs, authors)
        state[prefix + name] = tensor
    for block, parts in qkv.items():
        state[f"{prefix}blocks.{block}.attn.qkv.weight"] = torch.cat([parts[p] for p in ("query", "key", "value")])
    return state


def transformers_videomae(patch: int = 16) -> tuple[nn.Module, nn.LayerNorm]:
    from transformers import VideoMAEConfig, VideoMAEModel

    config = VideoMAEConfig(
        image_size=patch * 4, patch_size=patch, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=100, layer_norm_eps=1e-6, use_mean_pooling=True,
    )  # fmt: skip
    model = randomise(VideoMAEModel(config))
    return model, randomise(nn.LayerNorm(48, 1e-6))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["finetuned", "pretrained", "hub", "half"])
def test_videomae2_layouts(layout, tmp_path):
    patch = 14 if layout == "half" else 16
    model, norm = transformers_videomae(patch)
    if layout == "half":
        model, norm = model.half().float(), norm.half().float()
    model.fc_norm = norm
    prefix = {"pretrained": "encoder.", "hub": "model."}.get(layout, "")
    state = authors_videomae2(model, prefix, "norm" if layout == "pretrained" else "fc_norm")
    extra = {"pretrained": ("mask_token", "decoder.blocks.0.norm1.weight", "encoder_to_decoder.weight")}
    state |= dict.fromkeys(extra.get(layout, ("head.weight",)), torch.ones(3))
    file = tmp_path / "model.pth"
    if layout == "hub":
        file = tmp_path / "model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    elif layout == "half":
        torch.save({"module": {name: tensor.half() for name, tensor in state.items()}}, file)
    else:
        torch.save({"model": state, "args": argparse.Namespace(lr=1e-3), "epoch": 3}, file)
    pixels = torch.randn(1, 16, 3, patch * 4, patch * 4)
    reference = norm(model(pixels).last_hidden_state)
    sizes = FAMILIES["videomae2_base"] | {"patch": patch, "size": patch * 4}
    assert_exact(build_encoder("videomae2_base", str(file), **sizes).features(pixels), reference)


@torch.no_grad()
def test_videomae2_resizes_its_table(tmp_path):
    model, norm = transformers_videomae()
    model.fc_norm = norm
    torch.save(authors_videomae2(model, "", "fc_norm"), tmp_path / "model.pth")
    table = rearrange(model.embeddings.position_embeddings, "1 (t h w) d -> t d h w", t=8, h=4)
    table = F.interpolate(table, (3, 5), mode="bicubic")
    table = F.interpolate(rearrange(table, "t d h w -> (h w) d t"), 6, mode="linear")
    model.embeddings.position_embeddings = rearrange(table, "hw d t -> 1 (t hw) d")
    model.embeddings.patch_embeddings.image_size = (48, 80)
    pixels = torch.randn(1, 12, 3, 48, 80)
    assert_exact(tiny("videomae2_base", str(tmp_path)).features(pixels), norm(model(pixels).last_hidden_state))


class FourDSReference(nn.Module):
    """timm's blocks, as the authors' Flax modules are (representations4d/models/model.py)."""

    def __init__(self):
        from timm.models.vision_transformer import Block

        super().__init__()
        self.patch_embed = nn.Conv3d(3, 48, (2, 16, 16), (2, 16, 16))
        self.positions = nn.Parameter(torch.zeros(8, 4, 4, 48))
        norm, act = partial(nn.LayerNorm, eps=1e-6), partial(nn.GELU, approximate="tanh")
        self.blocks = nn.ModuleList(
            Block(48, 4, 100 / 48, qkv_bias=True, norm_layer=norm, act_layer=act) for _ in range(3)
        )

    def forward(self, pixels):
        x = self.patch_embed(pixels.movedim(1, 2)).permute(0, 2, 3, 4, 1)
        x = (x + self.positions).flatten(1, 3)
        for block in self.blocks:
            x = block(x)
        return x

    def arrays(self) -> dict[str, np.ndarray]:
        arrays = {
            "encoder/patch_embedding/Conv_0/kernel": self.patch_embed.weight.permute(2, 3, 4, 1, 0),
            "encoder/patch_embedding/Conv_0/bias": self.patch_embed.bias,
            "encoder/posenc/embeddings": self.positions,
        }
        for n, block in enumerate(self.blocks):
            layer = f"processor/layers_{n}"
            for norm, name in ((block.norm1, "attention_norm"), (block.norm2, "mlp_norm")):
                arrays |= {f"{layer}/{name}/scale": norm.weight, f"{layer}/{name}/bias": norm.bias}
            for part, weight, bias in zip(
                ("query", "key", "value"), block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True
            ):
                arrays[f"{layer}/attention/{part}/kernel"] = weight.T.unflatten(1, (4, 12))
                arrays[f"{layer}/attention/{part}/bias"] = bias.unflatten(0, (4, 12))
            arrays[f"{layer}/attention/out/kernel"] = block.attn.proj.weight.T.unflatten(0, (4, 12))
            arrays[f"{layer}/attention/out/bias"] = block.attn.proj.bias
            for dense, name in ((block.mlp.fc1, "dense_in"), (block.mlp.fc2, "dense_out")):
                arrays |= {f"{layer}/mlp/{name}/kernel": dense.weight.T, f"{layer}/mlp/{name}/bias": dense.bias}
        return {name: tensor.detach().numpy() for name, tensor in arrays.items()}


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["params/", "params/layers_0/"])
def test_4ds_layouts_and_resized_table(prefix, tmp_path):
    model = randomise(FourDSReference())
    readout = {"params/layers_2/Dense_0/kernel": np.ones((2, 2), np.float32)} if "layers" in prefix else {}
    np.savez(tmp_path / "4ds.npz", **{prefix + name: array for name, array in model.arrays().items()}, **readout)
    encoder = tiny("4ds_b", str(tmp_path), layer=3)
    pixels = torch.rand(1, 16, 3, 64, 64)
    assert_exact(encoder.features(pixels), model(pixels))
    assert_exact(tiny("4ds_b", str(tmp_path)).features(pixels), tiny("4ds_b", str(tmp_path), layer=1).features(pixels))
    wide = torch.rand(1, 16, 3, 32, 96)
    model.positions.data = F.interpolate(
        model.positions.movedim(-1, 1), (2, 6), mode="bicubic", antialias=True
    ).movedim(1, -1)
    assert_exact(encoder.features(wide), model(wide))


@torch.no_grad()
def test_timm_files_load_strictly(tmp_path):
    import timm

    model = randomise(timm.create_model("vit_tiny_patch16_224"), stem_scale=1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    encoder = tiny("timm/vit_tiny_patch16_224", str(tmp_path))
    pixels = torch.randn(1, 2, 3, 224, 224)
    assert_exact(encoder.features(pixels), model.forward_features(pixels[0])[:, 1:])
    with pytest.raises(UserError, match="lacks cls_token"):
        save_file({"pos_embed": model.pos_embed.data}, tmp_path / "model.safetensors")
        tiny("timm/vit_tiny_patch16_224", str(tmp_path))


def save_qwen(folder: Path, prefix: str = "visual.") -> nn.Module:
    """A tower in two shards, and a language model's tensor in a third that is not there."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = Qwen2_5_VLVisionConfig(
        hidden_size=64, depth=3, num_heads=4, intermediate_size=100, out_hidden_size=96, fullatt_block_indexes=[1]
    )
    model = randomise(Qwen2_5_VisionTransformerPretrainedModel(config))
    state = {prefix + name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    names = sorted(state)
    shards = {"1.safetensors": names[::2], "2.safetensors": names[1::2]}
    for shard, inside in shards.items():
        save_file({name: state[name] for name in inside}, folder / shard)
    weight_map = {name: shard for shard, inside in shards.items() for name in inside} | {"lm_head.weight": "3.st"}
    index = {"metadata": {"total_size": 9e9}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["visual.", "model.visual."])
def test_qwen_reads_the_tower_alone_and_batches_unequal_windows(prefix, tmp_path):
    model = save_qwen(tmp_path, prefix)
    pixels = torch.randn(1, 6, 3, 14 * 10, 14 * 22)  # windows of 8×8 patches, and cut ones of three other sizes
    flat = rearrange(pixels[0], "(t u) c (h p a) (w q b) -> (t h w p q) (c u a b)", u=2, p=2, q=2, a=14, b=14)
    reference = model(flat, grid_thw=torch.tensor([[3, 10, 22]])).pooler_output
    encoder = tiny("qwen2_5_vl_3b", str(tmp_path))
    assert_exact(encoder.features(pixels), reference)
    assert_exact(tiny("qwen2_5_vl_3b", str(tmp_path), window=2).features(pixels), reference)  # chunks are exact
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(UserError, match=r"hf download HUB_ID 2.safetensors` \(about 3.0 GB\)"):
        tiny("qwen2_5_vl_3b", str(tmp_path))


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(480, 832, (17, 30)), (720, 1280, (20, 36)), (20, 20, (1, 1))]
)
def test_qwen_grids(height, width, expected):
    assert tiny("qwen2_5_vl_3b").grid(8, height, width) == (4, *expected)


# Loading is strict


def saved(tmp_path: Path, change) -> str:
    """The tiny VideoMAE 2, changed, as a file."""
    model, model.fc_norm = transformers_videomae()
    path = tmp_path / "model.pth"
    torch.save(change(authors_videomae2(model, "", "fc_norm")), path)
    return str(path)


def without(state: dict, pattern: str) -> dict:
    return {name: tensor for name, tensor in state.items() if not re.search(pattern, name)}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda s: without(s, "fc1.bias"), {}, r"lacks blocks.0.mlp.fc1.bias, .*another size"),
        (lambda s: without(s, "fc_norm.bias"), {}, "lacks fc_norm.bias.*saved in part"),
        (lambda s: s, {"depth": 2}, "unknown blocks.2.*another size"),
        (lambda s: s, {"width": 96}, r"blocks.0.norm1.weight \(48,\) instead of \(96,\).*another size"),
        (lambda s: s | {"predictor.bias": torch.ones(1)}, {}, "unknown predictor.bias.*pretraining file"),
        (lambda s: {"other.weight": torch.ones(1)}, {}, "another family: it has no tensor .*patch_embed"),
    ],
)
def test_what_does_not_fit_is_named_with_its_cause(change, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        tiny("videomae2_base", saved(tmp_path, change), **options)


class Code:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_pickled_is_executed(tmp_path, capsys):
    torch.save({"model": {}, "code": Code()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="not executed"):
        tiny("videomae2_base", str(tmp_path))
    np.savez(tmp_path / "b.npz", **{"params/encoder/patch_embedding/Conv_0/kernel": np.array([Code()])})
    with pytest.raises(UserError, match="b.npz cannot be read"):
        tiny("4ds_b", str(tmp_path / "b.npz"))
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors"])
def test_a_broken_file_is_named(suffix, tmp_path):
    (tmp_path / f"broken{suffix}").write_bytes(b"no weights")
    with pytest.raises(UserError, match=f"broken{suffix}"):
        tiny("videomae2_base", str(tmp_path))


def test_folders_say_what_they_lack(tmp_path):
    with pytest.raises(UserError, match="There are no weights in"):
        tiny("4ds_b", str(tmp_path))
    for name in ("a.pt", "b.pt"):
        torch.save({}, tmp_path / name)
    with pytest.raises(UserError, match="several weights files, a.pt, b.pt"):
        tiny("vjepa2_large", str(tmp_path))


@pytest.mark.parametrize("name", [name for name, row in ENCODERS.items() if row and row.spec])
def test_missing_weights_come_with_the_command_that_fetches_them(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    row = ENCODERS[name]
    with pytest.raises(UserError, match=re.escape(row.download)):
        build_encoder(name)
    assert (row.url or f"hf download {row.weights}") in row.download


def test_hub_ids_are_looked_up_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "encoders.published.checkpoint.snapshot_download", lambda hub_id, local_files_only: str(tmp_path)
    )
    save_qwen(tmp_path)
    assert tiny("qwen2_5_vl_3b", "some/copy").dim == 96


def test_non_commercial_licences_are_said(tmp_path):
    save_qwen(tmp_path)
    with pytest.warns(UserWarning, match="qwen2_5_vl_3b are non-commercial"):
        tiny("qwen2_5_vl_3b", str(tmp_path))


def test_random_weights_are_warned_about_and_always_the_same():
    with pytest.warns(UserWarning, match="random weights"):
        first = tiny("4ds_b")
    torch.rand(1)
    assert first.fingerprint() == tiny("4ds_b").fingerprint()


def test_unknown_options_list_the_known():
    with pytest.raises(UserError, match="no option windw; it has .*layer.*width.*window"):
        tiny("vjepa2_large", windw=3)
    with pytest.raises(UserError, match="resolution is 'authers'"):
        tiny("vjepa2_large", resolution="authers")
    with pytest.raises(UserError, match="layer 4"):
        tiny("vjepa2_large", layer=4)
    with pytest.raises(UserError, match="timm has no model 'nothing'"):
        build_encoder("timm/nothing", "random")


# Any clip


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("frames", [1, 3, 8, 21])
def test_any_number_of_frames_of_any_shape(name, frames):
    encoder, video = tiny(name), clip(frames, 50, 83)
    features = encoder(video)
    assert features.shape == (2, *encoder.grid(frames, 50, 83), encoder.dim)
    assert len(encoder.seconds(torch.arange(frames))) == features.shape[1]
    torch.testing.assert_close(encoder.features(encoder.preprocess(video)), features)


@pytest.mark.parametrize("name", FAMILIES)
def test_windows_do_not_see_each_other_and_clips_do_not_either(name):
    encoder, video = tiny(name, window=8), clip(20)
    whole = encoder(video)
    parts = [encoder(window) for window in video.split(8, dim=1)]
    torch.testing.assert_close(whole, torch.cat(parts, dim=1))
    torch.testing.assert_close(whole[:1], encoder(video[:1]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_semantic_grid_gives_all_the_same_shape(name):
    encoder = tiny(name, semantic_grid=(2, 3, 3))
    features, plain = encoder(clip(8, 96, 96)), tiny(name)(clip(8, 96, 96))
    assert features.shape[1:4] == encoder.grid(8, 96, 96) == (2, 3, 3)
    torch.testing.assert_close(features.mean((1, 2, 3)), plain.mean((1, 2, 3)), atol=0.1, rtol=0.1)
    assert encoder.seconds(torch.arange(8)).tolist() == [3, 7]


@pytest.mark.parametrize("name", list(FAMILIES)[1:])
def test_the_authors_resolution_is_the_trained_square(name):
    encoder = tiny(name, resolution="authors")
    assert encoder.preprocess(clip(2, 50, 83)).shape[-2:] == (encoder.spec.size, encoder.spec.size)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_compile_into_one_graph(name):
    encoder = tiny(name, **{} if name.startswith("timm") else {"depth": 1})
    pixels = encoder.preprocess(clip(4, 64, 96))
    with torch.no_grad():
        compiled = torch.compile(encoder.tokens, backend="eager", fullgraph=True)(pixels)
        torch.testing.assert_close(compiled, encoder.tokens(pixels))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(name, dtype):
    video = clip(4)
    exact, half = tiny(name)(video), tiny(name, dtype=dtype)(video)
    assert half.dtype == torch.float32
    assert F.cosine_similarity(half, exact, dim=-1).mean() > 0.995
    with torch.autocast("cpu", torch.bfloat16):  # changes nothing: a fit's precision is not the encoder's
        assert torch.equal(tiny(name)(video), exact)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [(20, 31), (90, 91)])
def test_resize_is_pillow(kernel, size):
    image = clip(1, 48, 50)[0, 0]
    expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size[::-1], getattr(Image, kernel.upper()))
    expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1).float()
    difference = (resize(image, *size, kernel) - expected).abs()
    assert difference.max() <= 1 and difference.mean() < 0.1


# A fit on each family

CONFIG_OF = dict(zip(("qwen2_5_vl", "vjepa2", "videomae2", "4ds", "timm"), FAMILIES, strict=True))
SMALL_CLIPS = [
    "--data.train_shards=shards/toy/train-*.tar", "--data.val_shards=shards/toy/heldout-*.tar",
    "--data.num_frames=49", "--data.height=48", "--data.width=48",
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIG_OF)
def test_a_fit_on_each_family_runs_offline(config, workspace, lightning):
    name = CONFIG_OF[config]
    options = {"weights": "random", "semantic_grid": [2, 3, 3]} | FAMILIES[name]
    command = f"fit -c configs/encoders/{config}.yaml"
    assert f"lightning {command}" in (CONFIGS / f"encoders/{config}.yaml").read_text()
    lightning(
        *command.replace("configs", str(CONFIGS)).split(), f"--model.encoder={name}", "--model.size=toy",
        *[f"--model.encoder_options.{option}={value}" for option, value in options.items()],
        "--model.text_encoder=bytes", "--model.compressor_steps=1", "--trainer.max_steps=2", *SMALL_CLIPS,
    )  # fmt: skip
    assert Path(f"runs/{config}/checkpoints/last.ckpt").is_file()


@pytest.mark.parametrize("config", CONFIG_OF)
def test_the_configs_are_the_real_experiment(config):
    settings = yaml.safe_load((CONFIGS / f"encoders/{config}.yaml").read_text())
    model, data = settings["model"]["init_args"], settings["data"]
    with torch.device("meta"):
        encoder = build_encoder(model["encoder"], "random", **model["encoder_options"])
    frames = Clip(data["num_frames"], data["height"], data["width"], 24.0, 1.6)
    grid = encoder.grid(len(frames.semantic_times), frames.height, frames.width)
    assert grid == (4, 10, 18) and len(encoder.seconds(frames.semantic_times)) == 4
    assert model["encoder_options"].keys().isdisjoint({"weights", "width", "depth"})


# Every row

PARAMETERS = {  # in millions
    "qwen2_5_vl_3b": 668.7, "qwen2_5_vl_7b": 676.6, "qwen2_5_vl_32b": 688.8, "qwen2_5_vl_72b": 704.6,
    "vjepa2_large": 303.9, "vjepa2_huge": 631.6, "vjepa2_giant": 1012.2, "vjepa2_giant_384": 1012.2,
    "videomae2_small": 21.9, "videomae2_base": 86.2, "videomae2_large": 303.9, "videomae2_huge": 631.6,
    "videomae2_giant": 1011.6, "4ds_b": 87.4, "4ds_e": 3809.5,
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, row in ENCODERS.items() if row and row.spec])
def test_every_row_has_the_published_size(name):
    layer = {"layer": ENCODERS[name].spec.depth} if name.startswith("4ds") else {}
    with torch.device("meta"):
        encoder = build_encoder(name, "random", **layer)
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], rel=2e-3)
    assert encoder.grid(8, 480, 832)[0] == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, row in ENCODERS.items() if row and row.spec and row.run])
def test_full_size_rows_run(name):
    encoder = build_encoder(name, "random", resolution="authors" if ENCODERS[name].spec.size else "native")
    features = encoder(clip(2, 224, 224)[:1])
    assert features.shape == (1, *encoder.grid(2, 224, 224), encoder.dim) and features.isfinite().all()
