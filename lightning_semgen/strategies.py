"""config.yaml files of runs from before the rooms name the strategies by this path."""

from lightning_semgen.training.strategies import FSDP, FSDP2

__all__ = ["FSDP", "FSDP2"]
