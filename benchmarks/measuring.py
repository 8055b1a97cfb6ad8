"""Time and memory of a function, as the benchmarks of the generators take them."""

import ctypes
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

M_MMAP_THRESHOLD, SMALL = -3, 2**16


def clock(device: str) -> float:
    """Seconds; on a CPU the process's own, because other programs may be running."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def medians(functions: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, float]:
    """Median seconds of each function; the functions alternate, after one call of each that is not counted."""
    taken = {name: [] for name in functions}
    for counted in [False] + [True] * rounds:
        for name, function in functions.items():
            start = clock(device)
            function()
            if counted:
                taken[name].append(clock(device) - start)
    return {name: median(values) for name, values in taken.items()}


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
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        function()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        os.write(write, str(peak - before).encode())
    finally:
        os._exit(0)
