"""`lightning completion`: what a shell needs to complete commands and options.

Of Lightning's commands the options of stage, data and trainer are completed by name: their whole parser, in which every
class can stand for a callback or a logger, would be a script of 137 MB.
"""

from importlib import import_module
from inspect import signature
from typing import Literal

from jsonargparse import ArgumentParser

from lightning_semgen.commands import COMMANDS
from lightning_semgen.short_help import FIRST, documented


def completion(shell: Literal["bash", "zsh", "fish"]) -> None:
    """Prints a completion script: lightning completion bash > ~/.local/share/bash-completion/completions/lightning.

    Args:
        shell: yours.
    """
    print(whole_parser().get_completion_script(f"shtab-{shell}"))


def whole_parser() -> ArgumentParser:
    """All commands, with their options."""
    parser = ArgumentParser(prog="lightning")
    commands = parser.add_subcommands()
    for name, (purpose, _, _) in FIRST.items():
        commands.add_subcommand(name, trainer_parser(), help=purpose)
    for name, purpose in COMMANDS.items():
        function = getattr(import_module(f"lightning_semgen.commands.{name}"), name)
        if list(signature(function).parameters) == ["arguments"]:
            own = trainer_parser()
        else:
            own = ArgumentParser()
            own.add_function_arguments(function, as_positional=True)
        commands.add_subcommand(name, own, help=purpose)
    return parser


def trainer_parser() -> ArgumentParser:
    from lightning import Trainer

    parser = ArgumentParser()
    parser.add_argument("-c", "--config", type=str)
    parser.add_argument("--ckpt_path", type=str)
    parser.add_argument("--seed_everything", type=int)
    options = {group: documented(group) for group in ("model", "data")}
    options["trainer"] = dict.fromkeys(list(signature(Trainer.__init__).parameters)[1:], "")
    for group, texts in options.items():
        for name in texts:
            parser.add_argument(f"--{group}.{name}", type=str)
    return parser
