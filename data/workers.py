"""What a loader's worker does before its first sample."""

import gc


def settle(worker: int) -> None:
    """Keeps a worker's memory flat.

    PyAV's filter graphs are cycles, which only the collector of old objects frees, and that runs when their number has
    grown by a quarter. Without the imported modules' hundreds of thousands it is small, so that it runs often.
    """
    gc.freeze()
    gc.collect()  # counts anew
