"""A training step of our network against diffusers' WanTransformer3DModel.

python benchmarks/train_step.py [--device cuda --size 1.3B]

Same shapes, weights, dtype, text and fused AdamW, in one process; steps alternate, medians count, of the ratio too.
Memory is what a first step adds to the weights, the optimiser's moments included.
"""

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from measuring import faster, medians, peak_memory, rounds

from lightning_semgen.transformer import Size, VideoTransformer, size_of

NARROW = Size(dim=384, depth=8, heads=6, ffn_dim=1536)


def networks(size: Size, device: str, dtype: torch.dtype) -> tuple[WanTransformer3DModel, VideoTransformer]:
    wan = WanTransformer3DModel(
        num_attention_heads=size.heads, attention_head_dim=size.dim // size.heads, text_dim=512, ffn_dim=size.ffn_dim,
        num_layers=size.depth,
    )  # fmt: skip
    ours = VideoTransformer(16, 512, size, rotary_rate=4.0)
    ours.load_state_dict(wan.state_dict())
    return wan.to(device, dtype).train(), ours.to(device, dtype).train()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", help="a row of SIZES; without it about 20M parameters")
    parser.add_argument("--latents", type=int, nargs=3, default=[5, 32, 32], help="steps, height and width in cells")
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    wan, ours = networks(size_of(args.size) if args.size else NARROW, args.device, dtype)
    make = partial(torch.randn, device=args.device, dtype=dtype)
    z, v, text = make(1, 16, *args.latents), make(1, 16, *args.latents), make(1, 64, 512)
    t, seconds = torch.full((1,), 0.5, device=args.device), tuple(k / 4 for k in range(args.latents[0]))

    def step(network, optimiser, predict) -> None:
        F.mse_loss(predict().float(), v.float()).backward()
        optimiser.step()
        optimiser.zero_grad()

    predictions = {
        "diffusers": (wan, lambda: wan(z, t * 1000, text, return_dict=False)[0]),
        "ours": (ours, lambda: ours(z, t, text, seconds)),
    }
    steps = {
        name: partial(step, network, torch.optim.AdamW(network.parameters(), fused=True), predict)
        for name, (network, predict) in predictions.items()
    }
    millions = sum(p.numel() for p in ours.parameters()) / 1e6
    print(f"{millions:.1f}M parameters, {args.latents[0] * args.latents[1] * args.latents[2] // 4} tokens, {dtype}")
    memory = {name: peak_memory(run, args.device) for name, run in steps.items()}
    times = rounds(steps, args.device, args.rounds)
    for name, seconds in medians(times).items():
        print(f"{name:10} {seconds * 1e3:9.1f} ms a step   {memory[name] / 1e6:9.1f} MB at most")
    ratio = faster(times["ours"], times["diffusers"])
    print(f"steps/s {ratio:.3f}×, peak memory {memory['ours'] / memory['diffusers']:.3f}×")


if __name__ == "__main__":
    main()
