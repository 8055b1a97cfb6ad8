"""The plain video transformer inside V-JEPA 2, VideoMAE 2 and 4DS.

Our own blocks: transformers' VJEPA2Model has wrong positions off its trained square, its VideoMAEModel makes a table of
its own for another grid, and 4DS is not in it.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from encoders.published.base import Spec

EPS = 1e-6  # of every norm in the three families


def patchify(pixels: Tensor, tubelet: int, patch: int) -> Tensor:
    """Pixels (B, T, 3, H, W) to patches (B, T', H', W', 3·tubelet·patch²), in the order of a Conv3d's weight."""
    return rearrange(pixels, "b (t u) c (h p) (w q) -> b t h w (c u p q)", u=tubelet, p=patch, q=patch)


class Attention(nn.Module):
    """Full attention; `rotary` is cos and sin (N, head width), added pairwise to q and k in float32."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the neighbouring channels (0, 1), (2, 3), … of x (…, N, d), in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return torch.addcmul(x.float() * cos, turned, sin).to(x.dtype)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int, gelu: str):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, EPS), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, EPS)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.GELU(gelu), nn.Linear(mlp, width))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attn(self.norm1(x), rotary)
        return x + self.mlp(self.norm2(x))


class VideoViT(nn.Module):
    """Patches to tokens, all of a clip attending to all.

    Args:
        spec: sizes.
        norm: whether a LayerNorm ends it.
        gelu: "none" for the exact one, "tanh" for its approximation.
    """

    def __init__(self, spec: Spec, norm: bool, gelu: str = "none"):
        super().__init__()
        self.patch_embed = nn.Linear(3 * spec.tubelet * spec.patch**2, spec.width)  # a Conv3d whose stride is its size
        self.blocks = nn.ModuleList(Block(spec.width, spec.heads, spec.mlp, gelu) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(spec.width, EPS) if norm else nn.Identity()

    def cut(self, layer: int | None, final_norm: bool) -> None:
        """Leaves the first `layer` blocks, and the norm that ends them if it is wanted."""
        self.blocks = self.blocks[:layer]
        if not final_norm:
            self.norm = nn.Identity()

    def forward(
        self, patches: Tensor, positions: Tensor | None = None, rotary: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Patches (B, T', H', W', P) to tokens (B, T', H', W', width); `positions` (T', H', W', width) are added."""
        x = self.patch_embed(patches.to(self.patch_embed.weight.dtype))
        if positions is not None:
            x = x + positions.to(x.dtype)
        grid, x = x.shape[1:4], x.flatten(1, 3)
        for block in self.blocks:
            x = block(x, rotary)
        return self.norm(x).unflatten(1, grid)
