"""The video transformer: Wan 2.1's, with semantic tokens in context.

Parameters carry the names of diffusers' `WanTransformer3DModel`, so its checkpoints load as they are. Without semantic
tokens the network is Wan's. B batch, N tokens, C channels of the generated thing, d of the semantics.
"""

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from einops import rearrange
from torch import Tensor, nn

from lightning_semgen.model.blocks import Block, layouts, modulated
from lightning_semgen.model.condition import Condition
from lightning_semgen.model.positions import Grid, upcast
from lightning_semgen.model.sizes import Size


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

    def forward(self, z: Tensor, t: Tensor, condition: Condition, seconds: tuple[float, ...]) -> Tensor:
        """Velocity (B, C, T, H, W) at times t (B,) of the flow, given the times in the video of z's T steps.

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
        if (semantics := condition.semantics) is not None:
            tokens = self.semantic_embedding(semantics.z.flatten(1, 3).to(dtype))
            x = torch.cat([x, tokens.type_as(x)], dim=1)
            grids.append(semantics.grid)
            times.append(self.condition_embedder.time(semantics.tau)[1])
        text = self.condition_embedder.text_embedder(condition.text.to(dtype))
        head_dim, sizes = self.size.dim // self.size.heads, [len(g) for g in grids]
        even_odd = layouts(tuple(grids), self.rotary_rate, head_dim, self.window_seconds, upcast(x).dtype, x.device)
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
        x = self.proj_out(modulated(upcast(x), self.norm_out, shift, scale).type_as(x))
        axes = dict(zip(("p", "q", "r"), self.patch, strict=True))
        return rearrange(x, "b (t h w) (p q r c) -> b c (t p) (h q) (w r)", h=grid.height, w=grid.width, **axes)
