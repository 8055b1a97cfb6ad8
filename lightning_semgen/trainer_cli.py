"""fit, validate, test and predict: LightningCLI, whose runs are folders."""

from pathlib import Path

from jsonargparse import Namespace
from lightning import LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from transformers.utils import logging as transformers_logging

from data.datamodule import VideoDataModule
from lightning_semgen.callbacks.board import CompareRuns, CountSteps, RunLogger
from lightning_semgen.callbacks.channels import Channels
from lightning_semgen.callbacks.gallery import Gallery
from lightning_semgen.callbacks.loss_curves import LossCurves
from lightning_semgen.callbacks.lost_rank import LostRank
from lightning_semgen.callbacks.progress import Progress
from lightning_semgen.callbacks.reference_sheet import ReferenceSheet
from lightning_semgen.callbacks.rejected_samples import RejectedSamples
from lightning_semgen.callbacks.results import WriteResults
from lightning_semgen.callbacks.stop_on_signal import StopOnSignal
from lightning_semgen.callbacks.throughput import Throughput
from lightning_semgen.errors import UserError
from lightning_semgen.runs import LAST, RunCheckpoint, SaveRunConfig, last_checkpoint, link_clip, run_folder
from lightning_semgen.stages import latent, semantic, toy_parts  # noqa: F401  classes are found by their short names
from lightning_semgen.training import strategies  # noqa: F401  registers names
from lightning_semgen.training.checkpoints import AtomicCheckpointIO, checkpoint_facts, is_checkpoint

transformers_logging.disable_progress_bar()

TRAINER_DEFAULTS = {
    "check_val_every_n_epoch": None,  # the stream of training samples has no end
    "use_distributed_sampler": False,  # the data module shares samples between ranks itself
    "num_sanity_val_steps": 0,
}


class SemGenCLI(LightningCLI):
    """LightningCLI; a run is a folder (see `runs`)."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Gallery, "gallery")
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
        there = is_checkpoint(last) or last.exists()
        if self.subcommand == "fit" and there and (path is None or not path.samefile(last)):
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
            RejectedSamples(),
            LossCurves(),
            Channels(),
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
    """Parses arguments and, with `execute`, runs their subcommand."""
    return kind(
        LightningModule,
        VideoDataModule,
        subclass_mode_model=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=SaveRunConfig,
        trainer_defaults=TRAINER_DEFAULTS,
        args=args,
        run=execute,
    )
