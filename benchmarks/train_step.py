"""A training step of our network against diffusers' WanTransformer3DModel.

python benchmarks/train_step.py [--device cuda --size 1.3B --latents 13 60 104 --checkpoint --compile]

Both networks have the same shapes, weights, dtype, text and fused AdamW, in one process. Steps alternate; the ratio is
the median of the rounds' ratios. Memory is what a first step adds to the weights, the optimiser's moments included.
"""

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from measuring import faster, medians, peak_memory, rounds

from lightning_semgen.model.condition import Condition
from lightning_semgen.model.sizes import Size, size_of
from lightning_semgen.model.transformer import VideoTransformer

NARROW = Size(dim=384, depth=8, heads=6, ffn_dim=1536)
TEXT = (64, 512)  # tokens, channels


def networks(size: Size, device: str, dtype: torch.dtype) -> tuple[WanTransformer3DModel, VideoTransformer]:
    with torch.device(device):
        wan = WanTransformer3DModel(
            num_attention_heads=size.heads, attention_head_dim=size.dim // size.heads, text_dim=TEXT[1],
            ffn_dim=size.ffn_dim, num_layers=size.depth,
        )  # fmt: skip
        ours = VideoTransformer(16, TEXT[1], size, rotary_rate=4.0)
    ours.load_state_dict(wan.state_dict())
    return wan.to(device, dtype).train(), ours.to(device, dtype).train()


def step_flops(size: Size, tokens: int) -> float:
    """FLOPs of a forward and backward pass, the backward pass twice the forward one; none for recomputed blocks."""
    linear = tokens * (6 * size.dim**2 + 2 * size.dim * size.ffn_dim) + TEXT[0] * 2 * size.dim**2
    attention = 2 * tokens * (tokens + TEXT[0]) * size.dim
    return 3 * 2 * size.depth * (linear + attention)


def compare(
    size: Size, device: str, latents: list[int], number: int, checkpointed: bool = False, compiled: bool = False
) -> dict[str, float]:
    """Seconds and bytes of a step of each, and how many of ours fit into one of diffusers'."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    wan, ours = networks(size, device, dtype)
    if checkpointed:
        wan.enable_gradient_checkpointing()
        ours.checkpoint_blocks = True
    if compiled:
        wan.compile_repeated_blocks(dynamic=False)
        ours.compile(dynamic=False)
    make = partial(torch.randn, device=device, dtype=dtype)
    z, v, text = make(1, 16, *latents), make(1, 16, *latents), make(1, *TEXT)
    t, seconds = torch.full((1,), 0.5, device=device), tuple(k / 4 for k in range(latents[0]))

    def step(network, optimiser, predict) -> None:
        F.mse_loss(predict().float(), v.float()).backward()
        optimiser.step()
        optimiser.zero_grad()

    predictions = {
        "diffusers": (wan, lambda: wan(z, t * 1000, text, return_dict=False)[0]),
        "ours": (ours, lambda: ours(z, t, Condition(text), seconds)),
    }
    steps = {
        name: partial(step, network, torch.optim.AdamW(network.parameters(), fused=True), predict)
        for name, (network, predict) in predictions.items()
    }
    memory = {}
    if device == "cuda" or not compiled:  # the threads of Inductor do not live in a forked process
        memory = {f"{name} bytes": peak_memory(run, device) for name, run in steps.items()}
    times = rounds(steps, device, number)
    flops = step_flops(size, latents[0] * latents[1] * latents[2] // 4)
    rates = {f"{name} TFLOP/s": flops / time / 1e12 for name, time in medians(times).items()}
    ratio = {"ratio": faster(times["ours"], times["diffusers"])}
    return {f"{name} seconds": time for name, time in medians(times).items()} | memory | rates | ratio


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", help="a row of SIZES; without it about 20M parameters")
    parser.add_argument("--latents", type=int, nargs=3, default=[5, 32, 32], help="steps, height and width in cells")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--checkpoint", action="store_true", help="run blocks again in the backward pass")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    args = parser.parse_args()
    size = size_of(args.size) if args.size else NARROW
    found = compare(size, args.device, args.latents, args.rounds, args.checkpoint, args.compile)
    for name in ("diffusers", "ours"):
        memory = f"{found[f'{name} bytes'] / 1e6:9.1f} MB at most" if f"{name} bytes" in found else ""
        print(f"{name:10} {found[f'{name} seconds'] * 1e3:9.1f} ms a step   {memory}")
    print(f"steps/s {found['ratio']:.3f}×")


if __name__ == "__main__":
    main()
