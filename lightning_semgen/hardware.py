"""GPUs, as their datasheets have them."""

from dataclasses import dataclass

import torch

USABLE = 0.9  # of a card's memory; the rest is left to CUDA, NCCL and fragments


@dataclass(frozen=True)
class GPU:
    """Datasheet values: dense bf16 peak in FLOP/s, memory in bytes; and the beginning of CUDA's name for it."""

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
