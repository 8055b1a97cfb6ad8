"""Windows of 5 s against full attention, from 5 s to 60 s of video: time and peak memory of the latent generator.

python benchmarks/long_video.py [--device cuda --size 1.3B --cells 30 52]

Both run in one process, on one network and the same tokens: latents at 24 fps and a semantic step every 1.25 s. Passes
alternate, medians count. The exponents are slopes of log against log.
"""

import argparse
from functools import partial

import numpy as np
import torch
from measuring import faster, medians, peak_memory, rounds

from lightning_semgen.model.condition import Condition, SemanticTokens
from lightning_semgen.model.positions import Grid
from lightning_semgen.model.sizes import Size, size_of
from lightning_semgen.model.transformer import VideoTransformer

LENGTHS = (5, 10, 20, 40, 60)
NARROW = Size(dim=64, depth=2, heads=1, ffn_dim=128)


def inputs(seconds: int, cells: list[int], device: str, dtype: torch.dtype) -> tuple:
    times = tuple(4 * k / 24 for k in range(6 * seconds + 1))
    grid = Grid(tuple(1.25 * k + 0.625 for k in range(int(seconds / 1.25))), cells[0] // 4, cells[1] // 4)
    make = partial(torch.randn, device=device, dtype=dtype)
    semantics = SemanticTokens(
        make(1, len(grid.seconds), grid.height, grid.width, 8), torch.zeros(1, device=device), grid
    )
    condition = Condition(make(1, 64, 128), semantics)
    return make(1, 16, len(times), *cells), torch.full((1,), 0.5, device=device), condition, times


def training_step(network: VideoTransformer, arguments: tuple, window_seconds: float | None) -> None:
    network.window_seconds = window_seconds
    network(*arguments).float().square().mean().backward()
    network.zero_grad()


@torch.no_grad()
def forward(network: VideoTransformer, arguments: tuple, window_seconds: float | None) -> None:
    network.window_seconds = window_seconds
    network(*arguments)


def exponent(values: list[float]) -> float:
    return np.polyfit(np.log(LENGTHS), np.log(values), 1)[0]


def table(run, network: VideoTransformer, cells: list[int], device: str, number: int) -> None:
    print(f"\n{run.__name__}\n seconds   tokens   windows s      full s   faster   windows GB   full GB")
    dtype, rows = network.proj_out.weight.dtype, []
    for seconds in LENGTHS:
        arguments = inputs(seconds, cells, device, dtype)
        tokens = len(arguments[3]) * cells[0] * cells[1] // 4
        runs = {name: partial(run, network, arguments, w) for name, w in (("windows", 5.0), ("full", None))}
        memory = [peak_memory(function, device) / 1e9 for function in runs.values()]
        times = rounds(runs, device, number)
        time, ratio = medians(times), faster(times["windows"], times["full"])
        rows.append((time["windows"], memory[0]))
        print(
            f"{seconds:8} {tokens:8} {time['windows']:11.3f} {time['full']:11.3f} {ratio:7.2f}×"
            f" {memory[0]:12.3f} {memory[1]:9.3f}",
            flush=True,
        )
    print("exponents of windows: time {:.2f}, peak memory {:.2f}".format(*map(exponent, zip(*rows, strict=True))))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", help="a row of SIZES; without it a narrow network in which attention counts")
    parser.add_argument("--cells", type=int, nargs=2, default=[16, 24], help="of a latent, each 8 pixels")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    size = size_of(args.size) if args.size else NARROW
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    network = VideoTransformer(16, 128, size, semantic_dim=8, checkpoint_blocks=args.size is not None)
    network.to(args.device, dtype)
    for run in (training_step, forward):
        table(run, network, args.cells, args.device, args.rounds)


if __name__ == "__main__":
    main()
