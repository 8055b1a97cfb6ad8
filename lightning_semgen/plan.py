"""`lightning plan`: what a fit will need, counted before a machine is booked."""

from dataclasses import asdict, dataclass

import torch
from jsonargparse import Namespace
from torch import Tensor

from lightning_semgen.cost import Cost, frozen_flops, step_cost, tokens
from lightning_semgen.errors import UserError
from lightning_semgen.stage import Stage

HALF = {"bf16-mixed", "bf16-true", "16-mixed", "16-true"}  # values of trainer.precision that compute in two bytes
USABLE = 0.9  # of a card's memory; the rest is left to CUDA, NCCL and fragments


@dataclass(frozen=True)
class GPU:
    """What its datasheet says: dense bf16 FLOP/s at the peak, bytes of memory; how CUDA's name of it begins."""

    flops: float
    memory: float
    name: str


GPUS = {
    "h200": GPU(989e12, 141e9, "NVIDIA H200"),
    "h100": GPU(989e12, 80e9, "NVIDIA H100 80GB HBM3"),
    "a100": GPU(312e12, 80e9, "NVIDIA A100"),
    "l40s": GPU(362e12, 48e9, "NVIDIA L40S"),
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a device; None where it is not in `GPUS`. (Lightning's table has an H200's sparse ones.)"""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((gpu.flops for gpu in GPUS.values() if name.startswith(gpu.name)), None)


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
        """Whether weights are gathered in the precision that is computed in, though they have another."""
        return self.precision == "bf16-mixed" and self.strategy.lower().startswith(("fsdp2", "modelparallel"))

    @property
    def dtype(self) -> torch.dtype:
        """In which the generator computes."""
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
        "EMA twin": size(list(stage.ema.parameters())),
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


def plan(stage: Stage, setting: Setting, encoded: bool, gpu: str, mfu: float) -> dict:
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
    parts = memory(stage, setting)
    clips = setting.batch_size * setting.accumulate
    seconds = sum(flops.values()) * clips / (mfu * card.flops)
    own = costs["checkpointed" if stage.checkpoint_blocks else "kept"]
    total = sum(parts.values()) + own.activations * setting.batch_size
    return {
        "setting": asdict(setting) | {"gpu": gpu, "mfu": mfu, "checkpoint_blocks": stage.checkpoint_blocks},
        "clip_seconds": stage.clip.duration,
        "parameters": parameters(stage),
        "tokens": tokens(stage),
        "flops": {name: value * clips * setting.gpus for name, value in flops.items()},
        "memory": parts | {"activations": own.activations * setting.batch_size},
        "memory_total": total,
        "memory_usable": USABLE * card.memory,
        "fits": total <= USABLE * card.memory,
        "activations_per_clip": {name: cost.activations for name, cost in costs.items()},
        "largest_batch": {name: largest_batch(cost, parts, card) for name, cost in costs.items()},
        "step_seconds": seconds,
        "total_seconds": seconds * setting.max_steps if setting.max_steps > 0 else None,
    }


def largest_batch(cost: Cost, parts: dict[str, float], card: GPU) -> int:
    """Clips of the largest batch of one GPU that fits; 0: not even one does."""
    return max(0, int((USABLE * card.memory - sum(parts.values())) // cost.activations))


def parameters(stage: Stage) -> dict[str, int]:
    trained = [p.numel() for p in stage.parameters() if p.requires_grad]
    frozen = [p.numel() for part in stage.frozen.modules for p in part.parameters()]
    return {"trained": sum(trained), "frozen": sum(frozen)}


def table(facts: dict) -> str:
    """The plan as lines for a person."""
    setting, card = facts["setting"], GPUS[facts["setting"]["gpu"]]
    batches, wait = facts["largest_batch"], facts["total_seconds"]
    steps = f"{setting['gpus']} × {setting['batch_size'] * setting['accumulate']} clips"
    rows = [
        ("machine", f"{setting['gpus']} × {setting['gpu']}, {setting['strategy']}, {setting['precision']}"),
        ("parameters", ", ".join(f"{number(value)} {name}" for name, value in facts["parameters"].items())),
        ("tokens of a clip", ", ".join(f"{value:,} {name}" for name, value in facts["tokens"].items())),
        ("FLOPs of a step", f"{number(sum(facts['flops'].values()))} for {steps}"),
        *((f"  {name}", number(value)) for name, value in facts["flops"].items()),
        ("time of a step", f"{facts['step_seconds']:.3g} s at {setting['mfu']:.0%} of {number(card.flops)}FLOP/s"),
        (f"{setting['max_steps']:,} steps", f"{wait / 3600:.3g} h" if wait else "trainer.max_steps is not set"),
        ("memory of a GPU", f"{gb(facts['memory_total'])} of {gb(facts['memory_usable'])}"),
        *((f"  {name}", gb(value)) for name, value in facts["memory"].items()),
        ("largest batch of a GPU", f"{batches['kept']} clips; {batches['checkpointed']} with checkpoint_blocks"),
    ]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join([*(f"{name:{width}}{value}" for name, value in rows), verdict(facts)])


def verdict(facts: dict) -> str:
    """Whether it fits, and what may be done; a clip is on one GPU, since nothing here splits its tokens."""
    setting, kept = facts["setting"], facts["activations_per_clip"]
    clip = (
        f"There is no context parallelism: a clip of {facts['clip_seconds']:.3g} s has to fit one GPU, and its"
        f" activations are {gb(kept['kept'])}, or {gb(kept['checkpointed'])} with model.checkpoint_blocks."
    )
    if facts["fits"]:
        return f"It fits. {clip}"
    best = max(facts["largest_batch"].values())
    if best == 0:
        more = "more or " if min(kept.values()) < facts["memory_usable"] else ""  # which share weights, not a clip
        return f"It does not fit, nor does a batch of 1. {clip} Take {more}larger GPUs, or a shorter clip."
    with_blocks = "" if facts["largest_batch"]["kept"] == best else " with model.checkpoint_blocks"
    return f"It does not fit: data.batch_size {min(best, setting['batch_size'])}{with_blocks} does. {clip}"


def number(value: float) -> str:
    """1.42e9 as 1.42 G."""
    for power, unit in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {unit}"
    return f"{value:,.0f}"


def gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
