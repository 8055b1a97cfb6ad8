"""What a loader's worker does before its first sample."""

import gc
import os
from signal import SIG_BLOCK, SIGTERM, SIGUSR1, pthread_sigmask, sigwaitinfo
from threading import Thread


def prepare_worker(worker: int) -> None:
    """Keeps a worker's memory flat, and the worker itself until its parent ends it.

    PyAV's filter graphs are cycles, which only the collector of old objects frees, and that runs when their number has
    grown by a quarter. Without the imported modules' hundreds of thousands it is small, so that it runs often.
    """
    pthread_sigmask(SIG_BLOCK, {SIGTERM, SIGUSR1})
    Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    gc.freeze()
    gc.collect()  # counts anew


def _end_with(parent: int) -> None:
    """SLURM tells all processes of a task to end, but the parent needs samples until it has saved its run."""
    while sigwaitinfo({SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
