"""Sharded training by name: `trainer.strategy` fsdp and fsdp2, with _hybrid, _dcp or _hybrid_dcp behind.

A stage's weights, their EMA and the optimiser's moments are spread over all GPUs; the hybrid forms spread them
over those of a node and keep a copy in each node. With _dcp a checkpoint is a folder of torch.distributed.checkpoint,
in which each rank writes its share; without, the first rank gathers all of it into one file.
"""

from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from encoders.text import ByteTextEncoder
from lightning_semgen.model.blocks import Block
from lightning_semgen.model.compressor import MLP
from lightning_semgen.model.transformer import VideoTransformer
from lightning_semgen.training.checkpoints import (
    check_harmless,
    delete,
    one_sentence_when_full,
    put_in_place,
    unfinished_path,
)

# Each is gathered as a whole when it is called. Together they hold every parameter of a stage, since what is called
# outside of training_step, as sampling is, is gathered by none of the modules around it.
GATHERED = {Block, VideoTransformer, ByteTextEncoder, MLP}


class Checkpoints(Strategy):
    """What both strategies save, as one file or each rank its share."""

    distributed_checkpoint: bool

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """By the parameters' names: Lightning's own numbers count also what is not in the optimiser.

        For one file all of it on the first rank, nothing on the others.
        """
        if self.distributed_checkpoint:
            return super().optimizer_state(optimizer)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(self.model, getattr(optimizer, "_optimizer", optimizer), options=options)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        if not self.distributed_checkpoint:
            return Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)
        if self.is_global_zero:
            delete(unfinished_path(filepath))
        self.barrier()
        with one_sentence_when_full(filepath, deletes=self.is_global_zero):
            super().save_checkpoint(checkpoint, unfinished_path(filepath), storage_options)
        if self.is_global_zero:
            put_in_place(filepath)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Executes nothing that a checkpoint holds, whatever Lightning says of `weights_only`."""
        check_harmless(Path(self.broadcast(checkpoint_path)))
        return super().load_checkpoint(checkpoint_path, weights_only=True)


class FSDP(Checkpoints, FSDPStrategy):
    """Lightning's FSDPStrategy, wrapped part by part.

    Args:
        hybrid: whether each node keeps a copy of its own.
        distributed_checkpoint: whether each rank saves its share, in a folder.
    """

    def __init__(self, hybrid: bool = False, distributed_checkpoint: bool = False, **options):
        sharding = "HYBRID_SHARD" if hybrid else "FULL_SHARD"
        kind = "sharded" if distributed_checkpoint else "full"
        super().__init__(auto_wrap_policy=GATHERED, sharding_strategy=sharding, state_dict_type=kind, **options)
        self.distributed_checkpoint = distributed_checkpoint

    @property
    def mixed_precision_config(self) -> None:
        """Autocast does it all: FSDP's own would have averages and statistics follow trainer.precision too."""
        return None

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        self.model.check_is_root()  # settles it before a part is called by itself, as for measuring the semantics


class FSDP2(Checkpoints, ModelParallelStrategy):
    """Lightning's ModelParallelStrategy as data parallelism alone; the stage shards itself by `shard`.

    Args:
        hybrid: whether each node keeps a copy of its own.
        distributed_checkpoint: whether each rank saves its share, in a folder.
    """

    def __init__(self, hybrid: bool = False, distributed_checkpoint: bool = False, **options):
        super().__init__(save_distributed_checkpoint=distributed_checkpoint, **options)
        self.hybrid, self.distributed_checkpoint = hybrid, distributed_checkpoint

    def setup_environment(self) -> None:
        # Lightning's "auto" is nodes × GPUs of a node, which is what hybrid sharding takes.
        if not self.hybrid:
            self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()


for name, strategy in {"fsdp": FSDP, "fsdp2": FSDP2}.items():
    for hybrid, dcp in product((False, True), repeat=2):
        options = {"hybrid": hybrid, "distributed_checkpoint": dcp}
        full_name = name + "_hybrid" * hybrid + "_dcp" * dcp
        StrategyRegistry.register(full_name, strategy, override=True, **options)


def shard(stage: LightningModule) -> None:
    """Spreads the parameters of a stage over its device mesh, once.

    Under bf16-mixed the transformer's are gathered in bfloat16: half the traffic, and no copies of autocast,
    which keeps them until the pass ends. Gradients are summed in float32.
    """
    hybrid = stage.trainer.strategy.hybrid
    mesh = stage.device_mesh if hybrid else stage.device_mesh["data_parallel"]
    half = torch.bfloat16 if stage.trainer.precision == "bf16-mixed" else None
    for module in reversed(list(stage.modules())):  # inner ones first
        if type(module) in GATHERED:
            dtype = half if isinstance(module, Block | VideoTransformer) else None
            policy = MixedPrecisionPolicy(dtype, dtype and torch.float32, cast_forward_inputs=False)
            fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)


def total_norm(parameters: Iterable[nn.Parameter], model: nn.Module) -> Tensor:
    """2-norm of all gradients, a scalar, the same on all ranks; `model` is what the strategy has made of the stage."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        return norm.full_tensor()
    if isinstance(model, FullyShardedDataParallel):  # gradients are flat pieces, each on one rank of the group
        square = norm.square()
        torch.distributed.all_reduce(square, group=model.process_group)
        return square.sqrt()
    return norm


def by_parameter_name(state: Mapping[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """An optimiser's state dict with the names of parameters in place of numbers, so that any strategy reads it."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    groups = [group | {"params": [order[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {order[number]: values for number, values in state["state"].items()}, "param_groups": groups}
