"""The subcommands beside Lightning's own: one file and one row of the table each.

A command is a function with the name of its file. Its options are its typed parameters, and `--help` is its docstring;
one that reads the config of a fit takes its arguments as they are, for LightningCLI's parser.

pack.py    captioned videos into shards
encode.py  encoded shards ahead of a fit
plan.py    what a fit will need
doctor.py  an encoder's features of a video, as a picture
export.py  a run's weights for use elsewhere
completion.py  completion in a shell
"""

from importlib import import_module
from inspect import signature

COMMANDS = {
    "pack": "put captioned videos into shards",
    "encode": "run the frozen encoders over all clips of a config once, before training",
    "plan": "say what memory, FLOPs and hours a fit will need",
    "doctor": "show what an encoder sees in a video",
    "export": "write a run's weights as safetensors",
    "completion": "print a script that completes commands and options in your shell",
}
SHORT = {"-o": "--output"}


def run_command(name: str, arguments: list[str]) -> None:
    """Runs a row of `COMMANDS`."""
    function = getattr(import_module(f"lightning_semgen.commands.{name}"), name)
    if list(signature(function).parameters) == ["arguments"]:
        function(arguments)
        return
    from jsonargparse import auto_cli

    auto_cli(function, args=[SHORT.get(argument, argument) for argument in arguments], prog=f"lightning {name}")
