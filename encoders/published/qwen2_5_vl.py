"""Qwen2.5-VL's vision tower (arXiv 2502.13923, §2.1): pairs of frames, each attended to in windows and in full.

Our own blocks: transformers' Qwen2_5_VisionTransformerPretrainedModel is right, but loops over windows in Python (1,920
attention calls per windowed layer for 60 s at 480p) and gives its last blocks' tokens in the order of windows.
"""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from encoders.published.base import PublishedEncoder, Spec
from encoders.published.checkpoint import Checkpoint
from encoders.published.loading import FileLayout, Tensors
from encoders.published.vit import EPS, patchify

WINDOW = 8  # patches: 112 pixels
MERGE = 2  # patches a side that the merger makes one token of
PASS = 4  # frames: any even number gives the same features, few stay in the processor's caches
MIN_PIXELS, MAX_PIXELS = 128 * 28 * 28, 768 * 28 * 28  # of a video frame (qwen_vl_utils)


def attend_in_windows(q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
    """Attention of (B, H', W', heads, d) within windows of that many patches, the last of each row and column cut.

    The whole windows, those cut on one side and the one cut on both are four batches of equal windows.
    """
    out = torch.empty_like(v)
    for rows, tall in parts(q.shape[1], height):
        for columns, wide in parts(q.shape[2], width):
            windows = [
                rearrange(x[:, rows, columns], "b (y h) (x w) n d -> (b y x) n (h w) d", h=tall, w=wide)
                for x in (q, k, v)
            ]
            attended = F.scaled_dot_product_attention(*windows)
            out[:, rows, columns] = rearrange(
                attended, "(b y x) n (h w) d -> b (y h) (x w) n d",
                b=len(q), h=tall, w=wide, y=(rows.stop - rows.start) // tall,
            )  # fmt: skip
    return out


def parts(length: int, window: int) -> list[tuple[slice, int]]:
    """A side as whole windows and what is left: (where, window's length)."""
    whole = length // window * window
    sides = [(slice(0, whole), window), (slice(whole, length), length - whole)]
    return [(where, size) for where, size in sides if where.stop > where.start]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns channel i with channel i + d/2 of x (B, H', W', heads, d), in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.addcmul(x.float() * cos, torch.cat((-second, first), dim=-1), sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, spec: Spec, full: bool):
        super().__init__()
        self.heads, self.full = spec.heads, full
        self.qkv = nn.Linear(spec.width, 3 * spec.width)
        self.proj = nn.Linear(spec.width, spec.width)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b h w (three n d) -> three b h w n d", three=3, n=self.heads)
        height, width = x.shape[1:3] if self.full else (WINDOW, WINDOW)
        return self.proj(attend_in_windows(rotate(q, *rotary), rotate(k, *rotary), v, height, width).flatten(-2))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, spec: Spec, full: bool):
        super().__init__()
        self.norm1, self.attn = nn.RMSNorm(spec.width, EPS), Attention(spec, full)
        self.norm2, self.mlp = nn.RMSNorm(spec.width, EPS), SwiGLU(spec.width, spec.mlp)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(self.norm1(x), rotary)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """2×2 patches to one token of the language model's width."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.ln_q = nn.RMSNorm(width, EPS)
        self.mlp = nn.Sequential(nn.Linear(4 * width, 4 * width), nn.GELU(), nn.Linear(4 * width, out))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(rearrange(self.ln_q(x), "b (h p) (w q) d -> b h w (p q d)", p=MERGE, q=MERGE))


class Tower(nn.Module):
    """Patches of pairs of frames (B, H', W', P) to merged tokens (B, H'/2, W'/2, out)."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.head_width = spec.width // spec.heads
        self.patch_embed = nn.Linear(3 * spec.tubelet * spec.patch**2, spec.width, bias=False)
        self.blocks = nn.ModuleList(Block(spec, n in spec.full_attention) for n in range(spec.depth))
        self.merger = Merger(spec.width, spec.out)

    def forward(self, patches: Tensor) -> Tensor:
        x = self.patch_embed(patches.to(self.patch_embed.weight.dtype))
        rotary = self.rotary(*x.shape[1:3], x.device)
        for block in self.blocks:
            x = block(x, rotary)
        return self.merger(x)

    def rotary(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin (H', W', 1, head width): a quarter of the channels turn by y, a quarter by x, and both again."""
        half = self.head_width // 2
        omega = 1 / 10000 ** (torch.arange(0, half, 2, device=device, dtype=torch.float32) / half)
        y = (torch.arange(height, device=device)[:, None] * omega)[:, None].expand(-1, width, -1)
        x = (torch.arange(width, device=device)[:, None] * omega)[None].expand(height, -1, -1)
        angles = torch.cat((y, x, y, x), dim=-1)[:, :, None]
        return angles.cos(), angles.sin()


def read(name: str, file: Tensors) -> Tensor:
    return file["patch_embed.proj.weight"].flatten(1) if name == "patch_embed.weight" else file[name]


def pixel_limits(resolution: str | None, checkpoint: Checkpoint | None) -> dict[str, int]:
    """The areas between which frames are kept."""
    if resolution != "authors":
        return {"max_pixels": MAX_PIXELS}
    file = checkpoint.json("preprocessor_config.json") if checkpoint else {}
    return {"min_pixels": file.get("min_pixels", MIN_PIXELS), "max_pixels": file.get("max_pixels", MAX_PIXELS)}


class Qwen2_5_VL(PublishedEncoder):
    """The merger's tokens, one for 28×28 pixels of two frames, as the language model gets them.

    Args:
        layer: None: after the merger; else patch tokens (14×14 pixels, the tower's width) after that many blocks.
        min_pixels, max_pixels: by default 0 and the limit of a video frame in qwen_vl_utils; for `resolution` authors
            those of preprocessor_config.json beside the weights, or where there is none of qwen_vl_utils.
    """

    kernel = "bicubic"
    alone = True
    layouts = (FileLayout("patch_embed.proj.weight", read, r"^(model|language_model|lm_head)\."),)

    def __init__(
        self,
        spec: Spec,
        checkpoint: Checkpoint | None,
        layer: int | None = None,
        window: int = PASS,
        **options,
    ):
        limits = pixel_limits(options.get("resolution"), checkpoint)
        super().__init__(spec, layer=layer, window=window, **limits | options)
        self.network = self.load(partial(Tower, spec), checkpoint)
        self.dim, self.cell = spec.out, spec.patch * MERGE
        self.multiple = self.cell
        if layer is not None:
            self.network.blocks, self.network.merger = self.network.blocks[:layer], nn.Identity()
            self.dim, self.cell = spec.width, spec.patch

    @staticmethod
    def read_config(config: dict) -> dict:
        """Sizes from a config.json of transformers; {} from any other. Its defaults are not the published sizes."""
        if config.get("model_type") != "qwen2_5_vl":
            return {}
        names = {
            "hidden_size": "width", "depth": "depth", "num_heads": "heads", "intermediate_size": "mlp",
            "out_hidden_size": "out", "fullatt_block_indexes": "full_attention", "spatial_patch_size": "patch",
        }  # fmt: skip
        vision = config["vision_config"]
        return {ours: vision[theirs] for theirs, ours in names.items() if theirs in vision}

    def tokens(self, pixels: Tensor) -> Tensor:
        patches = patchify(pixels, self.tubelet, self.spec.patch)
        return self.network(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
