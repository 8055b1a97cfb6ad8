"""Everything that needs a GPU, in one run: `make gpu`.

python benchmarks/gpu.py [--out runs/gpu] [--parts attention step …] [--seconds 480]

The most valuable part comes first. Each part runs in a process of its own and writes its figures to OUT/gpu.json
before the next one begins, so that an interrupted run keeps what it has. Without a GPU all parts run small on the CPU,
which shows that they work and measures nothing.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a process that has seen CUDA cannot be forked

import torch
import train_step
from lightning import Callback, LightningDataModule, Trainer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler
from torch.utils.data import DataLoader

from data.clip import Clip
from encoders import build_encoder
from encoders.vae.base import build_vae
from lightning_semgen.callbacks.throughput import Throughput
from lightning_semgen.model.condition import Condition
from lightning_semgen.model.sizes import SIZES, Size
from lightning_semgen.model.transformer import VideoTransformer
from lightning_semgen.resources import Setting, plan_fit
from lightning_semgen.stages.latent import LatentStage

OUT = Path("runs/gpu")  # or --out
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
ROOT = Path(__file__).parents[1]
STEPS = 6  # of a fit


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], object], repeats: int = 5) -> float:
    """The median of `repeats` calls, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def tests() -> dict:
    """tests/gpu: every strategy, bfloat16, compiled blocks, two ranks."""
    log, environment = OUT / "tests.log", os.environ | {"OMP_NUM_THREADS": "2"}
    environment["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    limit = ["timeout", "-k", "5", str(PARTS[tests] - 10)]
    options = ["-v", "-rfE", "-n", str(min(12, os.cpu_count())), "-o", "addopts="]
    with log.open("w") as file:
        command = [*limit, sys.executable, "-m", "pytest", "tests/gpu", *options]
        subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    outcomes = re.findall(r"(?m)^\[gw\d+\].*? (PASSED|FAILED) (\S+)", log.read_text())
    failed = [name for outcome, name in outcomes if outcome == "FAILED"]
    return {"passed": len(outcomes) - len(failed), "failed": failed, "last line": log.read_text().splitlines()[-1]}


def attention() -> dict:
    """TFLOP/s of each backend of scaled_dot_product_attention, forward and backward, on the tokens of 5 s at 480p."""
    tokens, heads, width = (48_360, 12, 128) if GPU else (512, 2, 32)
    q, k, v = (torch.randn(1, heads, tokens, width, device=DEVICE, dtype=DTYPE, requires_grad=True) for _ in range(3))
    forward_flops, found = 4 * tokens**2 * heads * width, {}

    def both_ways() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()

    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(backend):
                found[backend.name] = 3.5 * forward_flops / seconds_of(both_ways) / 1e12
        except RuntimeError as error:
            found[backend.name] = str(error).splitlines()[0]
    found["as torch chooses"] = 3.5 * forward_flops / seconds_of(both_ways) / 1e12
    try:
        from flash_attn_interface import flash_attn_func

        def fa3() -> None:
            flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).sum().backward()

        found["FA3"] = 3.5 * forward_flops / seconds_of(fa3) / 1e12
    except ImportError:
        found["FA3"] = "not installed"
    return found


def step(compiled: bool = False) -> dict:
    """A step of our network at 1.3B against diffusers' Wan, in turns: 2 s at 480p."""
    size, latents = (SIZES["1.3B"], [13, 60, 104]) if GPU else (SIZES["toy"], [3, 8, 8])
    return train_step.compare(size, DEVICE, latents, 5 if GPU else 2, checkpointed=True, compiled=compiled)


def compiled_step() -> dict:
    """The same with compiled blocks in both."""
    return step(compiled=True)


class Batches(LightningDataModule):
    """One batch of an encoded clip, again and again."""

    buckets = None

    def __init__(self, stage: LatentStage, steps: int):
        super().__init__()
        grid = stage.space.grid
        features = torch.randn(1, len(grid.seconds), grid.height, grid.width, stage.space.encoder.dim)
        latents = torch.randn(1, *stage.latent_shape)
        self.batches = [
            {"latents": latents, "features": features, "caption": ["a red circle"], "key": p, "position": p}
            for p in torch.arange(steps).view(steps, 1)
        ]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)


class Waits(Callback):
    """Where in the last step the CPU waits for the GPU, and the speed of that step."""

    def on_train_batch_start(self, trainer, stage, batch, batch_idx) -> None:
        if GPU and batch_idx == len(trainer.datamodule.batches) - 1:
            self.catching = warnings.catch_warnings(record=True)
            self.caught = self.catching.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_end(self, trainer, stage) -> None:
        if GPU:
            torch.cuda.set_sync_debug_mode("default")
            self.catching.__exit__(None, None, None)
            places = [f"{Path(w.filename).name}:{w.lineno}" for w in self.caught if "synchroniz" in str(w.message)]
            self.places = dict(Counter(places))


def fit(compiled: bool = False) -> dict:
    """Lightning's loop on the latent stage at 1.3B: MFU, and peak memory against what `lightning plan` counts."""
    clip = Clip(121, 480, 832, 24.0, 1.6) if GPU else Clip(49, 64, 64, 24.0, 1.6)
    options = {"weights": "random", "depth": 1, "full_attention": (0,), "dtype": "bfloat16" if GPU else "float32"}
    with torch.device(DEVICE):
        stage = LatentStage(
            clip=clip, encoder="qwen2_5_vl_3b", encoder_options=options, vae="wan", vae_weights="random", shift=3.0,
            size="1.3B" if GPU else "toy", checkpoint_blocks=True, compile_blocks=compiled, warmup_steps=1,
            compressor_steps=STEPS,
        )  # fmt: skip
    waits = Waits()
    trainer = Trainer(
        accelerator="gpu" if GPU else "cpu", devices=1, precision="bf16-mixed", max_steps=STEPS + 1, max_epochs=1,
        logger=False, callbacks=[Throughput(), waits], enable_checkpointing=False, enable_model_summary=False,
        log_every_n_steps=2, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(stage, datamodule=Batches(stage, STEPS))
    speed = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("speed/")}
    waited = {"waits": waits.places} if GPU else {}
    return speed | planned(stage) | waited


def planned(stage: LatentStage) -> dict:
    """What `lightning plan` counts for that fit, in GB."""
    plan = plan_fit(stage, Setting("auto", "bf16-mixed", 1, 1, 1, STEPS), encoded=True, gpu="h100", mfu=0.4)
    parts = {name: value / 1e9 for name, value in plan["memory"].items()}
    return {"planned memory_gb": plan["memory_total"] / 1e9, "planned parts_gb": parts}


def profile() -> dict:
    """Where a step of four checkpointed blocks of 1.3B spends its time, 5 s at 480p: OUT/profile_*.txt."""
    found = {}
    shape, size = ((1, 16, 31, 60, 104), Size(1536, 4, 12, 8960)) if GPU else ((1, 16, 3, 8, 8), Size(64, 2, 2, 128))
    with torch.device(DEVICE):
        z, t, condition = torch.randn(shape), torch.full((1,), 0.5), Condition(torch.randn(1, 96, 64))
    seconds = tuple(k / 6 for k in range(shape[2]))
    for name, compiled in (("eager", False), ("compiled", True)):
        with torch.device(DEVICE):
            network = VideoTransformer(16, 64, size, checkpoint_blocks=True)
        if compiled:
            network.compile(dynamic=False)

        def run(network=network) -> None:
            with torch.autocast(DEVICE, torch.bfloat16):
                network(z, t, condition, seconds).float().square().mean().backward()
            network.zero_grad()

        found[f"{name} seconds"] = seconds_of(run, 3)
        with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            run()
            synchronize()
        order = "cuda_time_total" if GPU else "cpu_time_total"
        table = recorded.key_averages().table(sort_by=order, row_limit=45, max_name_column_width=90)
        (OUT / f"profile_{name}.txt").write_text(table)
    return found


def compiled_fit() -> dict:
    """The same with compiled blocks."""
    return fit(compiled=True)


def encoders() -> dict:
    """Frames per second of each family in bfloat16 with random weights: the semantic stream of four clips of 5 s."""
    shape, found = (4, 8, 3, 480, 832) if GPU else (1, 4, 3, 224, 224), {}
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    for name in ("vjepa2_large", "videomae2_base", "4ds_b", "qwen2_5_vl_3b"):
        options = {"dtype": "bfloat16"} if GPU else {"depth": 1} | ({"layer": 1} if name == "4ds_b" else {})
        encoder = build_encoder(name, "random", **options).to(DEVICE)
        with torch.no_grad():
            found[name] = shape[0] * shape[1] / seconds_of(partial(encoder, frames))
    return found


def vae() -> dict:
    """Frames per second of Wan's VAE at 480p, random weights, both ways."""
    found, frames = {}, 49 if GPU else 5
    side = (480, 832) if GPU else (64, 64)
    video = torch.randint(0, 256, (1, frames, 3, *side), dtype=torch.uint8, device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16) if GPU else (torch.float32,):
        coder = build_vae("wan", "random").to(DEVICE, dtype)
        latents = coder.encode(video)
        for name, run in (("encode", partial(coder.encode, video)), ("decode", partial(coder.decode, latents))):
            found[f"{name} {str(dtype).removeprefix('torch.')}"] = frames / seconds_of(run, repeats=2)
    return found


PARTS = {  # the most valuable first; seconds after which a part is ended
    tests: 200, attention: 40, step: 80, fit: 100, compiled_step: 120, compiled_fit: 120, profile: 60, encoders: 80, 
    vae: 80,
}  # fmt: skip


def machine() -> dict:
    return {
        "device": torch.cuda.get_device_name() if GPU else "CPU", "torch": torch.__version__,
        "cuda": torch.version.cuda, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def run_part(part: Callable[[], dict], file: Path) -> None:
    start = time.perf_counter()
    try:
        found = part()
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"[:2000]}
    if GPU and torch.cuda.is_initialized():
        found |= {"peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    file.write_text(json.dumps(found | machine() | {"part_seconds": time.perf_counter() - start}))


def main() -> None:
    global OUT
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--parts", nargs="+", choices=[part.__name__ for part in PARTS])
    parser.add_argument("--seconds", type=float, default=480, help="for all parts together")
    args = parser.parse_args()
    OUT = args.out.absolute()
    OUT.mkdir(parents=True, exist_ok=True)
    parts = Path(tempfile.mkdtemp())
    results, end, fork = {}, time.monotonic() + args.seconds, multiprocessing.get_context("fork")
    for part, limit in PARTS.items():
        if args.parts and part.__name__ not in args.parts:
            continue
        file = parts / part.__name__
        process = fork.Process(target=run_part, args=(part, file))
        process.start()
        process.join(max(1, min(limit, end - time.monotonic())))
        if process.is_alive():
            process.kill()
            process.join()
        found = json.loads(file.read_text()) if file.exists() else {"error": "out of time"}
        results[part.__name__] = found
        (OUT / "gpu.json").write_text(json.dumps(results, indent=1))
        print(part.__name__, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
