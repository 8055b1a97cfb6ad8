"""Lightning's loop, with all that a stage logs, against a plain loop on the same stage, batch and optimiser.

python benchmarks/loop.py [--size S]

Both draw the same noise, step fused AdamW and the EMA twin. Runs alternate; medians of the process's own time count.
"""

import argparse
import copy
import time
from statistics import median

import torch
from lightning import Trainer
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from data.clip import Clip
from lightning_semgen import flow, keyed
from lightning_semgen.stages import LatentStage

CLIP = Clip(num_frames=49, height=96, width=96, fps=24.0, semantic_fps=1.6)
BATCH, SKIPPED = 2, 2  # clips; steps at the start that are not counted


class Clock(Callback):
    """The process's time at the start of each step."""

    def __init__(self):
        self.times = []

    def on_train_batch_start(self, *_) -> None:
        self.times.append(time.process_time())


def batches(stage: LatentStage, steps: int) -> list[dict]:
    positions = torch.arange(steps * BATCH).view(steps, BATCH)
    caption = ["a small red circle moves left"] * BATCH
    latents = torch.randn(BATCH, *stage.latent_shape)
    return [{"latents": latents, "caption": caption, "key": p, "position": p} for p in positions]


def lightning(stage: LatentStage, steps: int) -> list[float]:
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, callbacks=[clock], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(stage, DataLoader(batches(stage, steps), batch_size=None))
    return clock.times


def plain(stage: LatentStage, steps: int) -> list[float]:
    optimiser = torch.optim.AdamW(stage.generator.parameters(), betas=(0.9, 0.99), fused=True)
    times, stage = [], stage.train()
    for batch in batches(stage, steps):
        times.append(time.process_time())
        t = flow.logit_normal(keyed.normal(batch["key"], "time"), stage.shift)
        prompt = stage.prompt(batch, stage.prompt_dropout)
        stage.flow_loss(stage.generator, batch["latents"], batch, t, prompt, None).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(stage.ema.parameters()), list(stage.generator.parameters()), 0.001)
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="S")
    parser.add_argument("--steps", type=int, default=8, help="of a run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each loop")
    args = parser.parse_args()
    torch.manual_seed(0)
    stage = LatentStage(clip=CLIP, encoder="none", size=args.size)
    taken = {"plain": [], "Lightning": []}
    for _ in range(args.rounds):
        for loop, name in ((plain, "plain"), (lightning, "Lightning")):
            times = loop(copy.deepcopy(stage), args.steps + SKIPPED + 1)[SKIPPED:]
            taken[name] += [end - start for start, end in zip(times, times[1:], strict=False)]
    steps = {name: median(values) for name, values in taken.items()}
    print("  ".join(f"{name} {seconds * 1e3:.1f} ms a step" for name, seconds in steps.items()))
    print(f"Lightning / plain {steps['Lightning'] / steps['plain']:.3f}")


if __name__ == "__main__":
    main()
