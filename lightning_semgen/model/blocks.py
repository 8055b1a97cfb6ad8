"""The transformer's block, Wan 2.1's, for tokens of several kinds.

B batch, N tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_semgen.model.positions import Grid, rotary_angles, rotary_positions, rotate, upcast
from lightning_semgen.model.sizes import Size
from lightning_semgen.model.windows import Windows, attention, windows_of


@dataclass(frozen=True)
class TokenLayout:
    """Windows of N tokens, and their rotary factors exp(i·angle) (N, 1, head_dim / 2) in the order of the windows."""

    windows: Windows
    turns: Tensor


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what validation makes first, training needs too
def layouts(
    grids: tuple[Grid, ...],
    rate: float,
    head_dim: int,
    window_seconds: float | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[TokenLayout, TokenLayout]:
    """The layouts of even and of odd layers; the first grid is the reference of the rotary positions."""
    positions = torch.cat([rotary_positions(grid, grids[0], rate) for grid in grids])
    angles = rotary_angles(positions, head_dim)[None, :, None]
    turns = torch.polar(torch.ones_like(angles), angles).to(device, dtype.to_complex())
    both = (windows_of(grids, window_seconds, shifted, device) for shifted in (False, True))
    return tuple(TokenLayout(windows, windows.gather(turns)[0]) for windows in both)


def per_kind(function: Callable[..., Tensor], sizes: list[int], *tensors: Tensor) -> Tensor:
    """Concatenates function(index of the kind, its tokens of each tensor) over the kinds of token."""
    if len(sizes) == 1:
        return function(0, *tensors)  # split and cat would copy, forward and backward
    parts = zip(*(x.split(sizes, dim=1) for x in tensors), strict=True)
    return torch.cat([function(kind, *part) for kind, part in enumerate(parts)], dim=1)


def modulated(x: Tensor, norm: nn.LayerNorm, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalises x (B, N, dim), scales it by 1 + scale (B, 1, dim) and shifts it by shift (B, 1, dim)."""
    if len(x) == 1:  # as the norm's own affine: one kernel, and nothing but x is kept for the backward pass
        weight, bias = (1 + scale).flatten().type_as(x), shift.flatten().type_as(x)
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)
    return torch.addcmul(shift, norm(x), 1 + scale)


class RMSNorm(nn.RMSNorm):
    """Computes in its input's precision, as linear layers do under autocast: a mixture has no fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


class LayerNorm(nn.LayerNorm):
    """Computes in its input's precision, too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.type_as(x), self.bias.type_as(x), self.eps)


class Attention(nn.Module):
    """Multi-head attention with RMS-normed queries and keys."""

    def __init__(self, dim: int, heads: int, eps: float = 1e-6):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q, self.norm_k = RMSNorm(dim, eps=eps), RMSNorm(dim, eps=eps)

    def forward(self, x: Tensor, context: Tensor, layout: TokenLayout | None = None) -> Tensor:
        q, k = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(context))
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (q, k, self.to_v(context)))  # (B, N, heads, head_dim)
        if layout is None:
            return self.to_out[0](attention(q, k, v).flatten(2))
        q, k = rotate(q, layout.turns), rotate(k, layout.turns)
        return self.to_out[0](attention(q, k, v, layout.windows.groups).flatten(2))


aten = torch.ops.aten


KERNELS = {  # of attention
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def keep_self_attention(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """What a checkpointed block keeps beside its input: self-attention is most of a long clip's FLOPs.

    Cross-attention, whose queries and keys differ in number, is cheap and would take as much memory.
    """
    keeps = op in KERNELS and args[0].shape == args[1].shape
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    """Self-attention, text cross-attention and feed-forward; modulated by time, chosen per kind of token."""

    checkpointed = keeps_attention = False  # set by the transformer

    def __init__(self, size: Size, eps: float = 1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(size.dim, eps, elementwise_affine=False)
        self.attn1 = Attention(size.dim, size.heads, eps)
        self.norm2 = LayerNorm(size.dim, eps)
        self.attn2 = Attention(size.dim, size.heads, eps)
        self.norm3 = nn.LayerNorm(size.dim, eps, elementwise_affine=False)
        self.ffn = FeedForward(size.dim, inner_dim=size.ffn_dim, activation_fn="gelu-approximate")
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, size.dim) / size.dim**0.5)

    def forward(self, x: Tensor, text: Tensor, times: list[Tensor], sizes: list[int], layout: TokenLayout) -> Tensor:
        if self.checkpointed and torch.is_grad_enabled():
            keep = partial(create_selective_checkpoint_contexts, keep_self_attention)
            options = {"context_fn": keep} if self.keeps_attention else {}
            return checkpoint(self.transformed, x, text, times, sizes, layout, use_reentrant=False, **options)
        return self.transformed(x, text, times, sizes, layout)

    def transformed(
        self, x: Tensor, text: Tensor, times: list[Tensor], sizes: list[int], layout: TokenLayout
    ) -> Tensor:
        # times: (B, 6, dim) for each kind of token; sizes: how many of the N tokens are of each kind. Latent and
        # semantic tokens have different times. A modulation for each token would be gigabytes at 50,000 tokens.
        table = [(self.scale_shift_table + upcast(t)).chunk(6, dim=1) for t in times]

        def modulate(x: Tensor, norm: nn.Module, first: int) -> Tensor:
            def one(kind: int, x: Tensor) -> Tensor:
                return modulated(upcast(x), norm, *table[kind][first : first + 2]).type_as(x)

            return per_kind(one, sizes, x)

        def add(x: Tensor, y: Tensor, gate: int) -> Tensor:
            def one(kind: int, x: Tensor, y: Tensor) -> Tensor:
                return torch.addcmul(upcast(x), upcast(y), table[kind][gate]).type_as(x)

            return per_kind(one, sizes, x, y)

        h = layout.windows.gather(modulate(x, self.norm1, 0))
        x = add(x, layout.windows.restore(self.attn1(h, h, layout)), 2)
        x = x + self.attn2(self.norm2(upcast(x)).type_as(x), text)
        return add(x, self.ffn(modulate(x, self.norm3, 3)), 5)
