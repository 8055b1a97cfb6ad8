"""What a fit needs of a GPU: memory by part, FLOPs and time, counted before a machine is booked."""

from dataclasses import asdict, dataclass, replace
from itertools import count

import torch
from jsonargparse import Namespace
from torch import Tensor

from lightning_semgen.cost import Cost, frozen_flops, step_cost, tokens
from lightning_semgen.errors import UserError
from lightning_semgen.hardware import GPU, GPUS, USABLE
from lightning_semgen.stages.base import Stage

HALF = {"bf16-mixed", "bf16-true", "16-mixed", "16-true"}  # values of trainer.precision that compute in two bytes


@dataclass(frozen=True)
class Setting:
    """How a config trains: strategy, precision, GPUs, clips of a GPU's batch, batches of an optimiser step, steps."""

    strategy: str
    precision: str
    gpus: int
    batch_size: int
    accumulate: int
    max_steps: int

    @classmethod
    def of(cls, trainer: Namespace, batch_size: int, gpus: int | None) -> "Setting":
        """UserError where the trainer's strategy is none that a plan can be made for."""
        strategy = trainer.strategy if isinstance(trainer.strategy, str) else trainer.strategy.class_path.split(".")[-1]
        if gpus is None:
            devices = trainer.devices if isinstance(trainer.devices, int) else 1
            gpus = max(devices, 1) * trainer.num_nodes
        setting = cls(
            strategy, str(trainer.precision or "32-true"), gpus, batch_size, trainer.accumulate_grad_batches,
            trainer.max_steps,
        )  # fmt: skip
        if not setting.sharded and not strategy.lower().startswith(("auto", "ddp", "singledevice")):
            raise UserError(f"No plan for trainer.strategy {strategy}: known are auto, ddp, fsdp and fsdp2.")
        return setting

    @property
    def sharded(self) -> bool:
        return self.strategy.lower().startswith(("fsdp", "modelparallel"))

    @property
    def gathers_half(self) -> bool:
        """Whether weights are gathered in bfloat16 although they are float32."""
        return self.precision == "bf16-mixed" and self.strategy.lower().startswith(("fsdp2", "modelparallel"))

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which the generator computes."""
        return torch.bfloat16 if self.precision in HALF else torch.float32


def size(tensors: list[Tensor], dtype: torch.dtype | None = None) -> int:
    """Bytes, in their own dtype or another."""
    return sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in tensors)


def memory(stage: Stage, setting: Setting) -> dict[str, float]:
    """Bytes of a GPU by part, whatever the batch: what sharding divides, and what it does not."""
    generator = list(stage.generator.parameters())
    known = {*generator, *stage.ema.parameters()}
    others = [p for p in stage.parameters() if p not in known]
    own = setting.dtype if setting.precision.endswith("-true") else torch.float32
    trained = [p for p in generator if p.requires_grad]
    gradients = size(trained, own) + size([p for p in others if p.requires_grad])
    parts = {
        "weights": size(generator, own) + size(others),
        "gradients": gradients,
        "optimiser state": 2 * gradients,  # AdamW's two moments
        "EMA": size(list(stage.ema.parameters())),
    }
    if setting.sharded:
        parts = {name: value / setting.gpus for name, value in parts.items()}
        gathered = setting.dtype if setting.gathers_half else own
        block = size(list(stage.generator.transformer.blocks[0].parameters()), gathered)
        parts["gathered blocks"] = 3 * block  # weights of one and of the next, gradients of one
    elif setting.gpus > 1:
        parts["DDP's buckets"] = gradients
    if own != setting.dtype and not setting.gathers_half:  # what autocast makes, it keeps until the pass ends
        parts[f"weights in {str(setting.dtype).removeprefix('torch.')}"] = size(generator, setting.dtype)
    return parts | {"frozen parts": size([p for part in stage.frozen.modules for p in part.parameters()])}


def plan_fit(stage: Stage, setting: Setting, encoded: bool, gpu: str, mfu: float) -> dict:
    """Everything that `lightning plan` says, as JSON has it: bytes, FLOPs, seconds.

    Args:
        encoded: whether the fit reads encoded shards, so that the frozen parts do not run.
        gpu: a row of `GPUS`.
        mfu: share of its peak at which a step is computed.
    """
    card = GPUS[gpu]
    costs = {name: step_cost(stage, on, setting.dtype) for name, on in (("kept", False), ("checkpointed", True))}
    flops = {
        "trained": costs["kept"].flops,
        "frozen": 0 if encoded else frozen_flops(stage),
        "recomputed": costs["checkpointed"].flops - costs["kept"].flops if stage.checkpoint_blocks else 0,
    }
    clips = setting.batch_size * setting.accumulate
    seconds = sum(flops.values()) * clips / (mfu * card.flops)
    own = costs["checkpointed" if stage.checkpoint_blocks else "kept"]
    parts = memory(stage, setting)
    of_batch = parts | activations(own, parts, setting)
    total = sum(of_batch.values())
    return {
        "setting": asdict(setting) | {"gpu": gpu, "mfu": mfu, "checkpoint_blocks": stage.checkpoint_blocks},
        "clip_seconds": stage.clip.duration,
        "parameters": parameters(stage),
        "tokens": tokens(stage),
        "flops": {name: value * clips * setting.gpus for name, value in flops.items()},
        "memory": of_batch,
        "memory_total": total,
        "memory_usable": USABLE * card.memory,
        "fits": total <= USABLE * card.memory,
        "activations_per_clip": {name: cost.activations for name, cost in costs.items()},
        "largest_batch": {name: largest_batch(cost, parts, setting, card) for name, cost in costs.items()},
        "step_seconds": seconds,
        "total_seconds": seconds * setting.max_steps if setting.max_steps > 0 else None,
    }


def activations(cost: Cost, parts: dict[str, float], setting: Setting) -> dict[str, float]:
    """Bytes of a batch's activations; and, negative, of the gradients that take the place of freed ones.

    The backward pass frees the activations of a block and makes its gradients. So both are not there at once, unless
    gradients of an earlier batch, or DDP's buckets, hold their memory from the beginning.
    """
    held = {"activations": cost.activations * setting.batch_size}
    if setting.accumulate > 1 or (setting.gpus > 1 and not setting.sharded):
        return held
    return held | {"gradients after activations": -min(parts["gradients"], cost.kept * setting.batch_size)}


def largest_batch(cost: Cost, parts: dict[str, float], setting: Setting, card: GPU) -> int:
    """Clips of the largest batch of one GPU that fits; 0: not even one does."""

    def fits(clips: int) -> bool:
        batch = activations(cost, parts, replace(setting, batch_size=clips))
        return sum((parts | batch).values()) <= USABLE * card.memory

    return next(clips for clips in count() if not fits(clips + 1))


def parameters(stage: Stage) -> dict[str, int]:
    trained = [p.numel() for p in stage.parameters() if p.requires_grad]
    frozen = [p.numel() for part in stage.frozen.modules for p in part.parameters()]
    return {"trained": sum(trained), "frozen": sum(frozen)}
