"""The LightningModules that are trained.

base.py            what both stages share
semantic.py        the semantic stage: prompt to semantics
latent.py          the latent stage: prompt and semantics to latents
frozen_parts.py    the frozen encoder, VAE and text encoder of a stage
semantic_space.py  frozen encoder and compressor: a batch to semantics
clip_stage.py      a stage as the data sees it
compressor_learning.py  learn, measure the statistics anew, freeze
partner.py         the other stage, from its run
toy_parts.py       training of the embedded encoder and VAE

config.yaml files name the stages as `lightning_semgen.stages.SemanticStage` and `lightning_semgen.stages.LatentStage`.
"""

from lightning_semgen.stages.latent import LatentStage
from lightning_semgen.stages.semantic import SemanticStage

__all__ = ["LatentStage", "SemanticStage"]
