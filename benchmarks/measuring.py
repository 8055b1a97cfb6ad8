"""Time and memory of functions, as the benchmarks take them."""

import ctypes
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

M_MMAP_THRESHOLD, SMALL = -3, 2**16

torch.set_num_threads(1)  # a forked process cannot use its parent's, and a shared machine gives them unevenly


def clock(device: str) -> float:
    """Seconds; on a CPU the process's own, because other programs may be running."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def rounds(functions: dict[str, Callable[[], object]], device: str, number: int) -> dict[str, list[float]]:
    """Seconds of each function; they take turns, so that a noisy minute is everyone's; a first turn does not count."""
    taken = {name: [] for name in functions}
    for counted in tqdm([False] + [True] * number, desc=", ".join(functions), leave=False):
        for name, function in functions.items():
            start = clock(device)
            function()
            if counted:
                taken[name].append(clock(device) - start)
    return taken


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: median(values) for name, values in times.items()}


def faster(ours: list[float], others: list[float]) -> float:
    """How often ours fit into others: the median of the rounds' ratios."""
    return median(other / our for our, other in zip(ours, others, strict=True))


def peak_memory(function: Callable[[], object], device: str) -> int:
    """Bytes that the function adds at most to what is there; on a CPU of a forked process's resident memory."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    read, write = os.pipe()
    if child := os.fork():
        os.close(write)
        with os.fdopen(read) as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        return int(answer)
    try:
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)  # what earlier functions freed, this one is not to have for nothing
        libc.mallopt(M_MMAP_THRESHOLD, SMALL)  # freed tensors go back to the system at once
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = resident("VmRSS")
        function()
        os.write(write, str(resident("VmHWM") - before).encode())
    finally:
        os._exit(0)


def resident(field: str) -> int:
    """Bytes of a field of this process's status."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024
