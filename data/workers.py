"""What a loader's worker does before its first sample."""

import gc
from signal import SIG_IGN, SIGTERM, SIGUSR1, signal


def settle(worker: int) -> None:
    """Keeps a worker's memory flat, and the worker itself until its parent ends it.

    SLURM tells all processes of a task to end. The parent stops after its step, for which it still needs samples, and
    waits for the one that the worker is at.

    PyAV's filter graphs are cycles, which only the collector of old objects frees, and that runs when their number has
    grown by a quarter. Without the imported modules' hundreds of thousands it is small, so that it runs often.
    """
    for number in (SIGTERM, SIGUSR1):
        signal(number, SIG_IGN)
    gc.freeze()
    gc.collect()  # counts anew
