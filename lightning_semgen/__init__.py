"""Text-to-video generation in semantic space (SemanticGen, arXiv 2512.20619).

cli.py        the `lightning` command
trainer_cli.py  fit, validate, test and predict, by LightningCLI
runs.py       a run as a folder: config, checkpoints, loading
generator.py  trained runs as a function from prompts to videos
cost.py       FLOPs and memory of a training step, counted without content
resources.py  memory by part, FLOPs and time of a fit
hardware.py   the GPUs whose datasheets are known
errors.py     the error a user can cause
short_help.py the options a person sets first
strategies.py, toy_parts.py  where old runs name these
commands/     its subcommands
callbacks/    what goes on beside the training
stages/       the LightningModules
evaluation/   metrics
training/     optimiser, strategies, checkpoints
model/        the networks
video/        generated videos, and pictures of them
"""


def __getattr__(name: str):
    if name == "Generator":  # only who asks for it waits for torch
        from lightning_semgen.generator import Generator

        return Generator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
