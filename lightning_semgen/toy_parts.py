"""config.yaml files of runs from before the rooms name the training of the embedded parts by this path."""

from lightning_semgen.stages.toy_parts import ToyEncoderTraining, ToyVAETraining

__all__ = ["ToyEncoderTraining", "ToyVAETraining"]
