"""`pipe:` shards: what a command prints, copied once, for samples are read in any order and a pipe has only one."""

import fcntl
import subprocess
from hashlib import blake2b
from pathlib import Path

from data.shards.remote import cache_folder
from lightning_semgen.errors import UserError

PREFIX = "pipe:"


def copied(shard: str, allowed: bool) -> Path:
    """The file with the output of the command of "pipe:COMMAND"; UserError if it failed or is not allowed."""
    if not allowed:
        raise UserError(f"{shard} would run a command: say --data.allow_pipe true if it may.")
    path = cache_folder("shards") / f"{blake2b(shard.encode(), digest_size=16).hexdigest()}.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the ranks of a machine wait for the one that copies
        if not path.exists():
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                status = subprocess.run(shard.removeprefix(PREFIX), shell=True, stdout=file).returncode
            if status:
                partial.unlink()
                raise UserError(f"The command of {shard} ended with status {status}.")
            partial.replace(path)
    return path
