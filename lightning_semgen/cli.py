"""The `lightning` command: LightningCLI's fit, validate, test and predict, and our own COMMANDS."""

import json
import logging
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from signal import SIGTERM
from typing import Literal

import torch
from jsonargparse import Namespace, auto_cli
from jsonargparse.typing import OpenUnitInterval, PositiveInt
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import Strategy
from transformers.utils import logging as transformers_logging

from data.datamodule import VideoDataModule
from data.pack import pack_videos
from lightning_semgen import (
    stages,  # noqa: F401  its classes are found by their short names
    strategies,  # noqa: F401  registers names
    toy_parts,  # noqa: F401
)
from lightning_semgen.board import CompareRuns, CountSteps, RunLogger
from lightning_semgen.callbacks import LostRank, Progress, ReferenceSheet, StopOnSignal, Throughput, WriteResults
from lightning_semgen.doctor import doctor
from lightning_semgen.errors import UserError
from lightning_semgen.export import export_run
from lightning_semgen.gallery import Gallery
from lightning_semgen.plan import GPUS, Setting, plan, table
from lightning_semgen.rejects import Rejects
from lightning_semgen.runs import (
    LAST,
    AtomicCheckpointIO,
    RunCheckpoint,
    SaveRunConfig,
    checkpoint_facts,
    is_checkpoint,
    last_checkpoint,
    link_clip,
    run_folder,
)
from lightning_semgen.stage import Stage

TRAINER_DEFAULTS = {
    "check_val_every_n_epoch": None,  # the stream of training samples has no end
    "use_distributed_sampler": False,  # the data module shares samples between ranks itself
    "num_sanity_val_steps": 0,
}


class SemGenCLI(LightningCLI):
    """LightningCLI whose runs are folders (see `runs`)."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        link_clip(parser)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        run = Path(config.trainer.default_root_dir or self._run_folder(config))
        config.trainer.default_root_dir = str(run)
        if self.subcommand:
            config.ckpt_path = self._checkpoint(run, config.ckpt_path)
            config.weights_only = True  # nothing pickled is executed
        if self.subcommand == "predict":
            config.return_predictions = False  # they are files, and would fill the memory

    def _run_folder(self, config: Namespace) -> Path:
        files = config.get("config") or []
        if not files:
            raise UserError("Which run? Give a config file with -c, or a folder with --trainer.default_root_dir.")
        return run_folder(Path(files[-1].relative))

    def _checkpoint(self, run: Path, ckpt_path: str | None) -> str | None:
        """The checkpoint to start from; UserError where it is missing or a fit would overwrite a run."""
        last = run / LAST
        if ckpt_path not in (None, "last"):
            path = Path(ckpt_path)
            if path.is_dir() and not is_checkpoint(path):
                path = last_checkpoint(path)
            if not is_checkpoint(path):
                raise UserError(f"There is no checkpoint {ckpt_path}: --ckpt_path takes last, a run folder or a file.")
        elif self.subcommand == "fit" and ckpt_path is None:
            path = None
        else:
            path = last_checkpoint(run)
        if self.subcommand == "fit" and last.exists() and (path is None or not path.samefile(last)):
            raise UserError(
                f"{run} already holds a trained run: continue it with --ckpt_path last, train elsewhere with"
                " --trainer.default_root_dir FOLDER, or delete it."
            )
        return None if path is None else str(path)

    def instantiate_trainer(self, **kwargs):
        config = self._get(self.config_init, "trainer")
        run = Path(config.default_root_dir)
        callbacks = [
            Throughput(),
            Rejects(),
            Gallery(),
            CountSteps(),
            CompareRuns(),
            WriteResults(),
            ReferenceSheet(),
            StopOnSignal(),
            LostRank(),
        ]
        if config.enable_progress_bar is not False:
            callbacks.append(Progress())
        config.callbacks = [*(config.callbacks or []), *callbacks]
        if config.logger is None:
            resumed = self._get(self.config, "ckpt_path") if self.subcommand == "fit" else None
            # Points past the checkpoint are dropped; its own validation has the number of its step.
            step = checkpoint_facts(Path(resumed))["global_step"] + 1 if resumed else 0
            folder = run if self.subcommand in (None, "fit") else run / self.subcommand
            kwargs["logger"] = RunLogger(folder.absolute(), purge_step=step)
        plugins = config.plugins or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand:  # what is given as an argument, setup cannot see
            arguments = self.config_init[self.subcommand]
            trainer.ckpt_path, arguments.ckpt_path = arguments.ckpt_path, None
        return trainer


def run(args: list[str] | None = None, execute: bool = True, kind: type[SemGenCLI] = SemGenCLI) -> SemGenCLI:
    """Parses arguments and, if they are a subcommand's to execute, runs it."""
    return kind(
        LightningModule,
        VideoDataModule,
        subclass_mode_model=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=SaveRunConfig,
        trainer_defaults=TRAINER_DEFAULTS,
        parser_kwargs={"epilog": "further commands: " + " ".join(f"{n}: {f.__doc__}" for n, f in COMMANDS.items())},
        args=args,
        run=execute,
    )


def encode(args: list[str]) -> None:
    """Runs the frozen parts of one config or several (-c A -c B) over their shards in one pass, on every device, and
    keeps what they say in each one's data.encoded."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    known, others = parser.parse_known_args(args)
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
    data.encode(others)


def on_every_device(strategy: Strategy, work: Callable[[], None]) -> None:
    """Does `work` in each process of a strategy, which the strategy's own launcher starts."""

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


def pack(args: list[str]) -> None:
    """Packs a folder, table or shards of captioned videos into shards."""
    auto_cli(pack_videos, args=args, prog="lightning pack")


def export(args: list[str]) -> None:
    """Writes the weights of a run as safetensors, for diffusers where the network is Wan's: RUN FOLDER."""
    auto_cli(export_run, args=args, prog="lightning export")


class PlanCLI(SemGenCLI):
    """A config's stage on the meta device, without a trainer."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--gpus", type=PositiveInt | None, help="default: trainer.devices × trainer.num_nodes")
        parser.add_argument("--gpu", type=Literal[tuple(GPUS)], default="h200", help="kind of GPU")
        parser.add_argument("--mfu", type=OpenUnitInterval, default=0.4, help="share of the GPU's peak that is reached")
        parser.add_argument("--json", action="store_true", help="bytes, FLOPs and seconds, for scripts")

    def instantiate_classes(self) -> None:
        with torch.device("meta"):
            self.model = self.parser.instantiate_classes(self.config).model


def plan_fit(args: list[str]) -> None:
    """Says what the fit of a config will need, memory, FLOPs and time: -c CONFIG --gpus 8 --gpu h200."""
    cli = run(args, execute=False, kind=PlanCLI)
    options, data = cli.config, cli.config.data
    if not isinstance(cli.model, Stage):
        raise UserError(f"A plan is made for SemanticStage and LatentStage, not for {type(cli.model).__name__}.")
    setting = Setting.of(options.trainer, data.batch_size, options.gpus)
    facts = plan(cli.model, setting, data.encoded is not None, options.gpu, options.mfu)
    print(json.dumps(facts, indent=1) if options.json else table(facts))


COMMANDS = {"plan": plan_fit, "pack": pack, "encode": encode, "doctor": doctor, "export": export}


def user_error(error: BaseException | None) -> UserError | None:
    """The user's mistake behind an error: jsonargparse wraps what a constructor raises, a loader what a worker does."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error and UserError(str(error).strip().rsplit("UserError: ", 1)[-1])


def hush() -> None:
    """Silences what tells a user of this command nothing."""
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")  # of FSDP2; none is changed in place
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)
    transformers_logging.disable_progress_bar()


def main() -> None:
    """A user's mistake ends the command with one sentence and exit code 1."""
    hush()
    try:
        if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
            COMMANDS[sys.argv[1]](sys.argv[2:])
        else:
            run()
    except Exception as error:
        if (mistake := user_error(error)) is None:
            raise
        sys.exit(f"lightning: {mistake}")
