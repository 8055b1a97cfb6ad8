"""Which stage is at fault: adherence of a latent run on real semantics of held-out clips, and on generated ones.

python benchmarks/which_stage.py runs/dim8 runs/latent_dim8 [--clips 192] [--semantic_guidance 1 3] [--guidance 1 3]
"""

import argparse

import torch
from torch import Tensor

from data.batch import collate
from data.clip import Clip
from data.datasets import ClipDataset
from data.random_numbers import sample_key
from data.shards.reader import Shards
from lightning_semgen.evaluation.adherence import Adherence
from lightning_semgen.runs import load_stage
from lightning_semgen.stages.latent import LatentStage
from lightning_semgen.stages.semantic import SemanticStage
from lightning_semgen.video.generated import previews


def batches(shards: str, clip: Clip, count: int, size: int = 32) -> list[dict]:
    clips = ClipDataset(Shards(shards), clip)
    rows = [clips[index] | {"key": sample_key("validation", index)} for index in range(min(count, len(clips)))]
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def adherence(latent: LatentStage, clips: list[dict], z_sem: list[Tensor]) -> str:
    metric = Adherence()
    for batch, z in zip(clips, z_sem, strict=True):
        metric.update(previews(latent.render(batch["caption"], batch["key"], z)), batch["info"])
    shares = metric.compute()
    return "  ".join(f"{name} {shares[name]:.3f}" for name in Adherence.names if name in shares)


@torch.no_grad()
def report(semantic: SemanticStage, latent: LatentStage, clips: list[dict], options: argparse.Namespace) -> None:
    real = [latent.space(batch) for batch in clips]
    generated = {}
    for scale in options.guidance:
        semantic.guidance_scale = scale
        z_sem = [semantic.sample_semantics(batch["caption"], batch["key"]) for batch in clips]
        generated[f"generated, guidance {scale:g}"] = z_sem
        print(f"std of generated semantics, guidance {scale:g}: {torch.cat(z_sem).std():.2f}")
    for scale in options.semantic_guidance:
        latent.semantic_guidance_scale = scale
        for name, z_sem in {"real": real, **generated}.items():
            print(f"{name:25} guidance on semantics {scale:g}  {adherence(latent, clips, z_sem)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("semantic_run")
    parser.add_argument("latent_run")
    parser.add_argument("--shards", default="shards/toy/heldout-*.tar")
    parser.add_argument("--clips", type=int, default=192)
    parser.add_argument("--semantic_guidance", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0])
    given = parser.parse_args()
    stages = load_stage(given.semantic_run), load_stage(given.latent_run)
    report(*stages, batches(given.shards, stages[1].clip, given.clips), given)
