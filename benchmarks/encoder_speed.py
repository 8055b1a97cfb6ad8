"""Speed and memory of the published encoders against their reference, with random weights, in one process.

python benchmarks/encoder_speed.py qwen2_5_vl_3b vjepa2_large videomae2_base 4ds_b [--seconds 60] [--device cuda]

The reference is transformers' class with SDPA, or for 4DS the authors' structure (flax: q, k and v apart, attention
written out). Both have the same weights; the last figure is how far their features are apart, max|d| / std. Passes
alternate and the faster of each counts. Memory is what a pass adds to what the weights take. On a CPU the time is the
process's own, because other programs may be running: OMP_NUM_THREADS=1.
"""

import argparse
import math
import time
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from encoders import ENCODERS, build_encoder
from encoders.published.base import PublishedEncoder

FPS = 1.6
SIZES = {"qwen": (480, 832)}  # others: their trained square


def qwen(encoder: PublishedEncoder) -> Callable[[Tensor], Tensor]:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    spec = encoder.spec
    config = Qwen2_5_VLVisionConfig(
        hidden_size=spec.width, depth=spec.depth, num_heads=spec.heads, intermediate_size=spec.mlp,
        out_hidden_size=spec.out, fullatt_block_indexes=list(spec.full_attention), attn_implementation="sdpa",
    )  # fmt: skip
    state = {name.replace("embed.", "embed.proj."): t for name, t in encoder.network.state_dict().items()}
    model = load(Qwen2_5_VisionTransformerPretrainedModel, config, state)

    def run(pixels: Tensor) -> Tensor:
        steps, height, width = pixels.shape[1] // 2, pixels.shape[-2] // 14, pixels.shape[-1] // 14
        flat = "b (t u) c (h p a) (w q e) -> (b t h w p q) (c u a e)"
        patches = rearrange(pixels, flat, u=2, p=2, q=2, a=14, e=14)
        grid = torch.tensor([[steps, height, width]] * len(pixels), device=pixels.device)
        return model(patches, grid_thw=grid).pooler_output

    return run


def vjepa2(encoder: PublishedEncoder) -> Callable[[Tensor], Tensor]:
    from transformers import VJEPA2Config, VJEPA2Model

    spec = encoder.spec
    config = VJEPA2Config(
        crop_size=spec.size, hidden_size=spec.width, num_attention_heads=spec.heads, num_hidden_layers=spec.depth,
        mlp_ratio=spec.mlp / spec.width, pred_num_hidden_layers=1, attn_implementation="sdpa",
    )  # fmt: skip
    names = {"patch_embed.": "encoder.embeddings.patch_embeddings.proj.", "blocks.": "encoder.layer.",
             ".attn.": ".attention.", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}  # fmt: skip
    state = renamed(encoder, names, "qkv", ("query", "key", "value"))
    state = {f"encoder.layer{name}" if name.startswith("norm.") else name: t for name, t in state.items()}
    model = load(VJEPA2Model, config, state, strict=False)  # without the predictor
    return lambda pixels: model(pixel_values_videos=pixels, skip_predictor=True).last_hidden_state


def videomae2(encoder: PublishedEncoder) -> Callable[[Tensor], Tensor]:
    from transformers import VideoMAEConfig, VideoMAEModel

    spec = encoder.spec
    config = VideoMAEConfig(
        image_size=spec.size, patch_size=spec.patch, hidden_size=spec.width, num_hidden_layers=spec.depth,
        num_attention_heads=spec.heads, intermediate_size=spec.mlp, layer_norm_eps=1e-6, use_mean_pooling=True,
        attn_implementation="sdpa", num_frames=spec.frames,
    )  # fmt: skip
    names = {"patch_embed.": "embeddings.patch_embeddings.projection.", "blocks.": "encoder.layer.",
             "attn.proj": "attention.output.dense", "attn.": "attention.attention.", "norm1": "layernorm_before",
             "norm2": "layernorm_after", "mlp.0": "intermediate.dense", "mlp.2": "output.dense"}  # fmt: skip
    for block in encoder.network.blocks:
        block.attn.qkv.bias[spec.width : 2 * spec.width] = 0  # of the keys, which have none
    state = renamed(encoder, names, "qkv", ("query", "key", "value"))
    model = load(VideoMAEModel, config, state, strict=False)  # the last norm is applied here
    return lambda pixels: encoder.network.norm(model(pixels).last_hidden_state)


class FlaxBlock(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.query, self.key, self.value = (nn.Linear(*block.attn.proj.weight.shape) for _ in range(3))
        parts = zip(block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True)
        for part, (weight, bias) in zip((self.query, self.key, self.value), parts, strict=True):
            part.weight.data, part.bias.data = weight.clone(), bias.clone()

    def forward(self, x: Tensor) -> Tensor:
        y, heads = self.block.norm1(x), self.block.attn.heads
        q, k, v = (part(y).unflatten(-1, (heads, -1)) for part in (self.query, self.key, self.value))
        weights = torch.einsum("bqhd,bkhd->bhqk", q / math.sqrt(q.shape[-1]), k).softmax(-1)
        x = x + self.block.attn.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))
        return x + self.block.mlp(self.block.norm2(x))


def fourds(encoder: PublishedEncoder) -> Callable[[Tensor], Tensor]:
    network, spec = encoder.network, encoder.spec
    blocks = nn.ModuleList(FlaxBlock(block) for block in network.blocks)
    embed = nn.Conv3d(3, spec.width, (2, 16, 16), (2, 16, 16), device=network.pos_embed.device)
    embed.weight.data = network.patch_embed.weight.data.view_as(embed.weight)
    embed.bias.data = network.patch_embed.bias.data

    def run(pixels: Tensor) -> Tensor:
        x = embed(pixels.movedim(1, 2).to(embed.weight.dtype)).movedim(1, -1)
        x = (x + encoder.positions(*x.shape[1:4]).to(x.dtype)).flatten(1, 3)
        for block in blocks:
            x = block(x)
        return x

    return run


REFERENCES = {"qwen": qwen, "vjepa2": vjepa2, "videomae2": videomae2, "4ds": fourds}


def renamed(encoder: PublishedEncoder, names: dict[str, str], joined: str, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """The network's weights under other names, its joined projections apart."""
    state = {}
    for name, tensor in encoder.network.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        pieces = tensor.chunk(len(parts)) if joined in name else (tensor,)
        for part, piece in zip(parts, pieces, strict=False):
            state[name.replace(joined, part)] = piece
    return state


def load(model: type, config, state: dict[str, Tensor], strict: bool = True) -> nn.Module:
    model = model(config).eval()
    own = model.state_dict()
    left = model.load_state_dict({n: t.view_as(own[n]) for n, t in state.items() if n in own}, strict=strict)
    assert not [name for name in left.missing_keys if not name.startswith("predictor")], left.missing_keys
    tensor = next(iter(state.values()))
    return model.to(tensor.device, tensor.dtype)


def peak_memory(device: torch.device, reset: bool = False) -> float:
    """GB: the most that was used since the last reset, or now after one."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 1e9
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1e6


def measure(run: Callable[[Tensor], Tensor], pixels: Tensor) -> tuple[float, float, Tensor]:
    """Seconds, GB and features of one pass."""
    clock = time.perf_counter if pixels.is_cuda else time.process_time
    before, start = peak_memory(pixels.device, reset=True), clock()
    features = run(pixels).float()
    if pixels.is_cuda:
        torch.cuda.synchronize()
    return clock() - start, peak_memory(pixels.device) - before, features


@torch.no_grad()
def compare(name: str, seconds: float | None, depth: int | None, device: str, dtype: str, repeats: int) -> None:
    family = next(key for key in REFERENCES if name.startswith(key))
    spec = ENCODERS[name].spec
    options = {"dtype": dtype} | ({"depth": depth} if depth else {})
    if family == "4ds":
        options["layer"] = depth or spec.depth  # the reference returns all
    encoder = build_encoder(name, "random", **options).to(device)
    frames = round(seconds * FPS) if seconds else encoder.window
    size = encoder.pixel_size(*SIZES.get(family, (spec.size, spec.size)))
    pixels = torch.randn(1, frames, 3, *size, device=device, dtype=encoder.dtype)
    reference = REFERENCES[family](encoder)
    window = frames if family == "qwen" else encoder.window  # transformers takes the whole video at once
    passes = encoder.features, lambda x: torch.cat([reference(part) for part in x.split(window, 1)], 1)
    runs = [[measure(run, pixels) for run in passes] for _ in range(repeats)]
    (ours, memory, features), (theirs, their_memory, expected) = (
        min(r, key=lambda r: r[0]) for r in zip(*runs, strict=True)
    )
    apart = (features.reshape(expected.shape) - expected).abs().max() / expected.std()
    print(
        f"{name}, {len(encoder.network.blocks)} blocks, {frames} frames {size[0]}×{size[1]}:"
        f" {1 / ours:.4f} clips/s ({frames / ours:.2f} frames/s, {memory:.2f} GB);"
        f" reference {1 / theirs:.4f} clips/s ({their_memory:.2f} GB); ×{theirs / ours:.2f}, apart {apart:.0e}",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="+", choices=[n for n, row in ENCODERS.items() if row and row.spec])
    parser.add_argument("--seconds", type=float, help="of video at 1.6 fps; default: one window")
    parser.add_argument("--depth", type=int, help="blocks; default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = vars(parser.parse_args())
    for name in arguments.pop("encoders"):
        compare(name, **arguments)
