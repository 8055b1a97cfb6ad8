"""The video transformer: Wan 2.1's, with semantic tokens in context.

Parameters carry the names of diffusers' `WanTransformer3DModel`, so its checkpoints load as they are. Without semantic
tokens the network is Wan's. B batch, N tokens, C channels of the generated thing, d of the semantics.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_semgen.errors import UserError
from lightning_semgen.positions import Grid, rotary_angles, rotary_positions, rotate, wide
from lightning_semgen.windows import Windows, attention, windows_of


@dataclass(frozen=True)
class Size:
    """Width, number of blocks, heads and hidden width of the feed-forward layers."""

    dim: int
    depth: int
    heads: int
    ffn_dim: int


SIZES = {
    "toy": Size(128, 4, 4, 384),
    "S": Size(384, 12, 6, 1536),
    "B": Size(768, 12, 12, 3072),
    "1.3B": Size(1536, 30, 12, 8960),
    "14B": Size(5120, 40, 40, 13824),
}


def size_of(name: str) -> Size:
    """The row of `SIZES`; UserError lists the known names."""
    if name not in SIZES:
        raise UserError(f"There is no transformer size {name!r}; known sizes: {', '.join(SIZES)}.")
    return SIZES[name]


@dataclass
class Semantics:
    """Semantic tokens in context: z (B, T', H', W', d), already noised to times tau (B,)."""

    z: Tensor
    tau: Tensor
    grid: Grid


@dataclass(frozen=True)
class Layout:
    """What self-attention knows of N tokens: windows, and in their order rotary turns (N, 1, head_dim / 2), complex."""

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
) -> tuple[Layout, Layout]:
    """The layouts of even and of odd layers; the first grid is the reference of the rotary positions."""
    positions = torch.cat([rotary_positions(grid, grids[0], rate) for grid in grids])
    angles = rotary_angles(positions, head_dim)[None, :, None]
    turns = torch.polar(torch.ones_like(angles), angles).to(device, dtype.to_complex())
    both = (windows_of(grids, window_seconds, shifted, device) for shifted in (False, True))
    return tuple(Layout(windows, windows.gather(turns)[0]) for windows in both)


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
    """In its input's precision, as autocast has linear layers: there is no fused kernel for a mixture."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


class LayerNorm(nn.LayerNorm):
    """In its input's precision too."""

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

    def forward(self, x: Tensor, context: Tensor, layout: Layout | None = None) -> Tensor:
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

    def forward(self, x: Tensor, text: Tensor, times: list[Tensor], sizes: list[int], layout: Layout) -> Tensor:
        if self.checkpointed and torch.is_grad_enabled():
            keep = partial(create_selective_checkpoint_contexts, keep_self_attention)
            options = {"context_fn": keep} if self.keeps_attention else {}
            return checkpoint(self.transformed, x, text, times, sizes, layout, use_reentrant=False, **options)
        return self.transformed(x, text, times, sizes, layout)

    def transformed(self, x: Tensor, text: Tensor, times: list[Tensor], sizes: list[int], layout: Layout) -> Tensor:
        # times: one (B, 6, dim) a kind; sizes: how many of the N tokens are of it
        table = [(self.scale_shift_table + wide(t)).chunk(6, dim=1) for t in times]

        def modulate(x: Tensor, norm: nn.Module, first: int) -> Tensor:
            def one(kind: int, x: Tensor) -> Tensor:
                return modulated(wide(x), norm, *table[kind][first : first + 2]).type_as(x)

            return per_kind(one, sizes, x)

        def add(x: Tensor, y: Tensor, gate: int) -> Tensor:
            def one(kind: int, x: Tensor, y: Tensor) -> Tensor:
                return torch.addcmul(wide(x), wide(y), table[kind][gate]).type_as(x)

            return per_kind(one, sizes, x, y)

        h = layout.windows.gather(modulate(x, self.norm1, 0))
        x = add(x, layout.windows.restore(self.attn1(h, h, layout)), 2)
        x = x + self.attn2(self.norm2(wide(x)).type_as(x), text)
        return add(x, self.ffn(modulate(x, self.norm3, 3)), 5)


class ConditionEmbedder(nn.Module):
    """Embeds times in [0, 1] and text."""

    def __init__(self, dim: int, text_dim: int, freq_dim: int):
        super().__init__()
        self.timesteps_proj = Timesteps(freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(freq_dim, dim)
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = PixArtAlphaTextProjection(text_dim, dim, act_fn="gelu_tanh")

    def time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(B, dim) for the output layer and (B, 6, dim) for the blocks."""
        waves = self.timesteps_proj(t * 1000)  # Wan's times run from 0 to 1000
        embedding = self.time_embedder(waves.to(self.time_proj.weight.dtype))
        return embedding, self.time_proj(F.silu(embedding)).unflatten(1, (6, -1))


class VideoTransformer(nn.Module):
    """Predicts the velocity of z (B, C, T, H, W).

    Args:
        channels: C.
        text_dim: channels of the text embeddings.
        size: a row of `SIZES`.
        patch: cells of z in one token, along T, H and W.
        semantic_dim: d of semantic tokens in context; None: the network takes none.
        rotary_rate: rotary positions per second.
        window_seconds: T_w of self-attention's windows; None: every token attends to all.
        checkpoint_blocks: whether training keeps each block's input alone and runs it again in the backward pass.
        keep_attention: whether a block that is run again finds the output of its self-attention kept.
        absolute_time: whether the input layer adds the times of z's steps, which rotary positions tell relative to each
            other alone; nothing at first.
    """

    def __init__(
        self,
        channels: int,
        text_dim: int,
        size: Size,
        patch: tuple[int, int, int] = (1, 2, 2),
        semantic_dim: int | None = None,
        rotary_rate: float = 6.0,
        window_seconds: float | None = None,
        checkpoint_blocks: bool = False,
        absolute_time: bool = False,
        keep_attention: bool = True,
        freq_dim: int = 256,
    ):
        super().__init__()
        self.size, self.patch, self.rotary_rate, self.window_seconds = size, patch, rotary_rate, window_seconds
        self.checkpoint_blocks, self.keep_attention = checkpoint_blocks, keep_attention
        self.patch_embedding = nn.Conv3d(channels, size.dim, kernel_size=patch, stride=patch)
        self.condition_embedder = ConditionEmbedder(size.dim, text_dim, freq_dim)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.norm_out = nn.LayerNorm(size.dim, 1e-6, elementwise_affine=False)
        self.proj_out = nn.Linear(size.dim, channels * patch[0] * patch[1] * patch[2])
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, size.dim) / size.dim**0.5)
        self._initialise()
        if semantic_dim is not None:  # its bias is the type embedding of the kind, as patch_embedding's is
            self.semantic_embedding = nn.Linear(semantic_dim, size.dim)
        if absolute_time:
            self.time_embedding = nn.Linear(freq_dim, size.dim, bias=False)
            nn.init.zeros_(self.time_embedding.weight)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.condition_embedder.time_proj.weight, std=0.02)
        nn.init.zeros_(self.proj_out.weight)  # the first prediction is 0, the mean of the target

    def forward(
        self, z: Tensor, t: Tensor, text: Tensor, seconds: tuple[float, ...], semantics: Semantics | None = None
    ) -> Tensor:
        """Velocity (B, C, T, H, W) at times t (B,), given text (B, L, text_dim) and the times of z's T steps.

        Inputs of any precision: they are turned to the weights'.
        """
        dtype = self.patch_embedding.weight.dtype
        x = self.patch_embedding(z.to(dtype))
        grid = Grid(seconds[self.patch[0] - 1 :: self.patch[0]], *x.shape[-2:])
        if hasattr(self, "time_embedding"):
            x = x + rearrange(self._absolute_time(grid), "t c -> c t 1 1")
        x = rearrange(x, "b c t h w -> b (t h w) c").contiguous()
        embedding, modulation = self.condition_embedder.time(t)
        grids, times = [grid], [modulation]
        if semantics is not None:
            tokens = self.semantic_embedding(semantics.z.flatten(1, 3).to(dtype))
            x = torch.cat([x, tokens.type_as(x)], dim=1)
            grids.append(semantics.grid)
            times.append(self.condition_embedder.time(semantics.tau)[1])
        text = self.condition_embedder.text_embedder(text.to(dtype))
        head_dim, sizes = self.size.dim // self.size.heads, [len(g) for g in grids]
        even_odd = layouts(tuple(grids), self.rotary_rate, head_dim, self.window_seconds, wide(x).dtype, x.device)
        for index, block in enumerate(self.blocks):
            block.checkpointed, block.keeps_attention = self.checkpoint_blocks, self.keep_attention
            x = block(x, text, times, sizes, even_odd[index % 2])
        return self._output(x[:, : len(grid)], embedding, grid)

    def _absolute_time(self, grid: Grid) -> Tensor:
        """(T, dim), of the positions that rotary angles are made of."""
        weight = self.time_embedding.weight
        positions = torch.tensor(grid.seconds, dtype=torch.float32, device=weight.device) * self.rotary_rate
        return self.time_embedding(self.condition_embedder.timesteps_proj(positions).to(weight.dtype))

    def compile(self, **options) -> None:
        """Compiles the blocks in place, as `torch.compile` with those options; all share a graph for each layout."""
        for block in self.blocks:
            block.compile(**options)

    def _output(self, x: Tensor, embedding: Tensor, grid: Grid) -> Tensor:
        shift, scale = (self.scale_shift_table + embedding.unsqueeze(1)).chunk(2, dim=1)
        x = self.proj_out(modulated(wide(x), self.norm_out, shift, scale).type_as(x))
        axes = dict(zip(("p", "q", "r"), self.patch, strict=True))
        return rearrange(x, "b (t h w) (p q r c) -> b c (t p) (h q) (w r)", h=grid.height, w=grid.width, **axes)
