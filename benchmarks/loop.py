"""Lightning's loop, with all that a stage logs, against a plain loop on the same stage, batches and optimiser.

python benchmarks/loop.py [--size S]

Within one fit a step of the plain loop follows each of Lightning's, so that a noisy minute is both's. Both draw the
same noise, step fused AdamW and the EMA. Seconds are the process's own, the ratio is the median of the steps'.
"""

import argparse
import copy
import tempfile

import torch
from lightning import Trainer
from lightning.pytorch import Callback
from measuring import clock, faster, medians
from torch.utils.data import DataLoader

from data import random_numbers
from data.clip import Clip
from lightning_semgen.callbacks.board import RunLogger
from lightning_semgen.callbacks.progress import Progress
from lightning_semgen.model import flow
from lightning_semgen.model.condition import Condition
from lightning_semgen.stages.latent import LatentStage

CLIP = Clip(num_frames=49, height=96, width=96, fps=24.0, semantic_fps=1.6)
BATCH, SKIPPED = 2, 3  # clips; steps at the start that are not counted


def batches(stage: LatentStage, steps: int) -> list[dict]:
    positions = torch.arange(steps * BATCH).view(steps, BATCH)
    caption = ["a small red circle moves left"] * BATCH
    latents = torch.randn(BATCH, *stage.latent_shape)
    return [{"latents": latents, "caption": caption, "key": p, "position": p} for p in positions]


class PlainLoop(Callback):
    """Takes a step of its own after each of Lightning's, on a copy of the stage, and both's times."""

    def __init__(self, stage: LatentStage):
        self.stage = copy.deepcopy(stage).train()
        self.optimiser = torch.optim.AdamW(self.stage.generator.parameters(), betas=(0.9, 0.99), fused=True)
        self.times = {"plain": [], "Lightning": []}

    def on_train_start(self, *_) -> None:
        self.since = clock("cpu")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch: dict, batch_idx: int) -> None:
        start = clock("cpu")  # what Lightning does after this hook is of its next step
        self.step(batch)
        end = clock("cpu")
        if batch_idx >= SKIPPED:
            self.times["Lightning"].append(start - self.since)
            self.times["plain"].append(end - start)
        self.since = end

    def step(self, batch: dict) -> None:
        stage = self.stage
        t = flow.logit_normal(random_numbers.normal(batch["key"], "time"), stage.shift)
        condition = Condition(stage.frozen.prompt(batch, stage.prompt_dropout))
        stage.flow_loss(stage.generator, stage.frozen.latents(batch), batch, t, condition).mean().backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(stage.ema.parameters()), list(stage.generator.parameters()), 0.001)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="S")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    torch.manual_seed(0)
    stage = LatentStage(clip=CLIP, encoder="none", size=args.size)
    plain = PlainLoop(stage)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu", max_steps=args.steps + SKIPPED, callbacks=[plain, Progress()],
            logger=RunLogger(folder, purge_step=None), log_every_n_steps=10, enable_checkpointing=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(stage, DataLoader(batches(stage, trainer.max_steps), batch_size=None))
    for name, seconds in medians(plain.times).items():
        print(f"{name} {seconds * 1e3:.1f} ms a step")
    print(f"Lightning / plain {faster(plain.times['plain'], plain.times['Lightning']):.3f}")


if __name__ == "__main__":
    main()
