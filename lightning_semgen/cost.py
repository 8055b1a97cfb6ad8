"""What a training step costs, FLOPs and memory, counted on tensors that have shapes and devices but no content."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from math import prod

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from data.clip import Clip
from lightning_semgen.model.transformer import VideoTransformer
from lightning_semgen.stages.base import Stage
from lightning_semgen.stages.latent import LatentStage

aten = torch.ops.aten
FORMULAS = flop_registry | {  # which knows attention on CUDA alone
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
BLOCKS = (2, 4)  # measured of a deeper network: two layouts of windows alternate, so each further pair costs the same


@dataclass(frozen=True)
class Cost:
    """The cost of a forward and backward pass.

    Attributes:
        flops: of both.
        activations: the most bytes that it holds beside weights and their gradients.
        kept: those of them that the blocks keep for the backward pass, which frees them one block after another.
    """

    flops: int
    activations: int
    kept: int


def step_cost(
    stage: Stage, checkpoint_blocks: bool = False, dtype: torch.dtype = torch.float32, clip: Clip | None = None
) -> Cost:
    """Cost of a training step on one encoded clip with the longest prompt; a batch of B costs B times as much.

    Args:
        stage: with weights on any device, meta too; it stays as it is.
        checkpoint_blocks: in place of the stage's own.
        dtype: of the generator's weights and of autocast.
        clip: None: the nominal one.
    """
    transformer = stage.generator.transformer
    depth, meters, clip = len(transformer.blocks), [], clip or stage.clip
    counts = BLOCKS if depth > BLOCKS[-1] else (depth,)
    mixed = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    for count in counts:
        with _altered(transformer, count, checkpoint_blocks), mixed:
            meters.append(_measure(_Step(stage, clip), _encoded(stage, clip), dtype))
    # All blocks cost the same, apart from their windows, which alternate: each further pair adds what the last one did.
    few, more, pairs = meters[0], meters[-1], (depth - counts[-1]) / 2
    flops, peak = (round(m + (m - f) * pairs) for f, m in ((few.flops, more.flops), (few.peak, more.peak)))
    return Cost(flops, peak, round((more.peak - few.peak) * depth / 2))


def frozen_flops(stage: Stage, clip: Clip | None = None) -> int:
    """FLOPs of the frozen parts on one clip; None: the nominal clip."""
    clip = clip or stage.clip
    streams = {"semantic_frames": len(clip.semantic_times), "frames": clip.num_frames}
    size = (3, clip.height, clip.width)
    frames = {name: torch.empty(1, steps, *size, dtype=torch.uint8, device="meta") for name, steps in streams.items()}
    return _measure(_Frozen(stage), frames).flops


def tokens(stage: Stage, clip: Clip | None = None) -> dict[str, int]:
    """Number of tokens of a clip (None: the nominal clip) by kind; for text, the maximum."""
    clip, counts = clip or stage.clip, {"text": stage.frozen.text.max_tokens}
    if stage.space is not None:
        counts["semantic"] = len(stage.space.grid_of(clip))
    if isinstance(stage, LatentStage):
        counts["latent"] = prod(stage.latent_shape_of(clip)[1:]) // prod(stage.generator.transformer.patch)
    return counts


class _Step(nn.Module):
    """A training step as the forward pass of one module, so that `functional_call` reaches all parameters."""

    def __init__(self, stage: Stage, clip: Clip):
        super().__init__()
        self.stage, self.shape = stage, (clip.num_frames, clip.height, clip.width)

    def forward(self, batch: dict) -> None:
        keys = torch.arange(len(batch["prompt"]))
        facts = {"key": keys, "shape": [self.shape] * len(keys)}
        losses = self.stage.losses(batch | facts, torch.full(keys.shape, 0.5), batch["prompt"])
        self.stage.total(losses).backward()


class _Frozen(nn.Module):
    """The frozen parts' forward passes."""

    def __init__(self, stage: Stage):
        super().__init__()
        self.stage, self.parts = stage, nn.ModuleList(stage.frozen.modules)

    @torch.no_grad()
    def forward(self, clips: dict) -> None:
        if self.stage.space is not None:
            self.stage.space.features(clips)
        if isinstance(self.stage, LatentStage):
            self.stage.frozen.latents(clips)
        if not (text := self.stage.frozen.text).learnt:
            ids = torch.zeros(1, text.max_tokens, dtype=torch.long)
            text.model(input_ids=ids, attention_mask=torch.ones_like(ids))


def _encoded(stage: Stage, clip: Clip) -> dict[str, Tensor]:
    """A batch of one encoded clip; tensors have no content, except for a prompt in bytes."""
    text, space, shapes = stage.frozen.text, stage.space, {}
    if space is not None:
        grid = space.grid_of(clip)
        shapes["features"] = (len(grid.seconds), grid.height, grid.width, space.encoder.dim)
    if isinstance(stage, LatentStage):
        shapes["latents"] = stage.latent_shape_of(clip)
    if not text.learnt:
        shapes["prompt"] = (text.max_tokens, text.dim)
    batch = {name: torch.empty(1, *shape, device="meta") for name, shape in shapes.items()}
    return {"prompt": torch.zeros(1, text.max_bytes, dtype=torch.long)} | batch if text.learnt else batch


def _measure(module: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype | None = None) -> "Meter":
    """Runs a module on a batch with fake CPU tensors in place of all tensors; the generator's have `dtype`."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(name: str, tensor: Tensor) -> Tensor:
        ours = dtype if name.startswith("stage.generator.") else None
        with mode:
            made = torch.empty(tensor.shape, dtype=ours or tensor.dtype, requires_grad=tensor.requires_grad)
        if made.requires_grad:  # gradients are counted as a part of their own, not as activations
            made.register_post_accumulate_grad_hook(_drop_gradient)
        return made

    state = {name: fake(name, tensor) for name, tensor in chain(module.named_parameters(), module.named_buffers())}
    batch = {name: fake(name, tensor) if tensor.is_meta else tensor for name, tensor in batch.items()}
    meter = Meter()
    with meter:
        torch.func.functional_call(module, state, (batch,))
    return meter


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def _altered(transformer: VideoTransformer, count: int, checkpoint_blocks: bool) -> Iterator[None]:
    """Within it the transformer has only its first `count` blocks, checkpointed or not."""
    before = transformer.blocks, transformer.checkpoint_blocks
    transformer.blocks, transformer.checkpoint_blocks = transformer.blocks[:count], checkpoint_blocks
    try:
        yield
    finally:
        transformer.blocks, transformer.checkpoint_blocks = before


class Meter(TorchDispatchMode):
    """Counts FLOPs, and the bytes of tensors that operations made and that are still alive, with their peak.

    FLOPs are by the formulas of torch's FlopCounterMode. That mode itself keeps checkpointed activations alive.
    """

    def __init__(self):
        super().__init__()
        self.flops = self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if (formula := FORMULAS.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=output)
        # A view, or the result of an operation in place, has the storage of an argument: nothing new was allocated.
        seen = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())  # autograd drops it when it needs it no more
        self.peak = max(self.peak, self.live)
        return output

    def _freed(self, size: int) -> None:
        self.live -= size


def _tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
