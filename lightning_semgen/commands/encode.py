"""`lightning encode`: runs the frozen parts over all clips of a config once, ahead of training."""

from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from signal import SIGTERM

from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy

from data.datamodule import VideoDataModule
from data.encoded.precompute import precompute
from lightning_semgen.errors import UserError
from lightning_semgen.trainer_cli import run


def encode(arguments: list[str]) -> None:
    """Runs the frozen parts of a config (-c) over its clips once, on every device, and writes encoded shards.

    Several configs (-c A -c B) are encoded in one pass over the same clips, each into its own data.encoded.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    known, others = parser.parse_known_args(arguments)
    configs = [["-c", config] for config in known.config] or [[]]
    first, *more = [run([*config, *others], execute=False) for config in configs]
    folders = [cli.datamodule.encoded for cli in (first, *more)]
    if None in folders:
        raise UserError("Where to? Name a folder for the encoded shards with --data.encoded.")
    if len(set(folders)) < len(folders):
        raise UserError(f"Each config needs a data.encoded of its own, here they are {', '.join(map(str, folders))}.")
    trainer = first.trainer
    trainer.strategy.connect(first.model)
    for cli in (first, *more):
        cli.datamodule.trainer = cli.model.trainer = trainer
    pairs = [(cli.datamodule, cli.model) for cli in more]
    on_every_device(trainer.strategy, partial(_encode, trainer, first.datamodule, pairs))


def _encode(trainer: Trainer, data: VideoDataModule, others: list[tuple[VideoDataModule, LightningModule]]) -> None:
    if trainer.local_rank == 0:
        data.prepare_data()
    trainer.strategy.barrier()
    precompute([(data, trainer.lightning_module), *others], trainer.global_rank, trainer.world_size)


def on_every_device(strategy: Strategy, work: Callable[[], None]) -> None:
    """Runs `work` in each process of a strategy; the strategy's own launcher starts them."""

    def process() -> None:
        strategy.setup_environment()
        work()

    if strategy.launcher is None:
        return process()
    try:
        strategy.launcher.launch(process)
    except BaseException:
        strategy.launcher.kill(SIGTERM)  # the others would go on without this one
        raise
