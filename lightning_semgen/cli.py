"""The `lightning` command. What a command needs is imported when it runs, so that help does not wait for it."""

import logging
import sys
import warnings

from lightning_semgen.commands import COMMANDS, run_command
from lightning_semgen.errors import UserError

TRAINER = {
    "fit": "train a stage",
    "validate": "losses and pictures on the validation clips",
    "test": "generate videos for held-out captions and measure them",
    "predict": "generate videos from prompts or reference videos",
}
OVERVIEW = """usage: lightning COMMAND [OPTIONS]

Text-to-video generation in semantic space (SemanticGen, arXiv 2512.20619).

{commands}

lightning COMMAND --help shows its options, lightning fit --help all every one of them."""


def overview() -> str:
    """All commands, a line each."""
    rows = [f"  {name:10} {line}" for name, line in (TRAINER | COMMANDS).items()]
    return OVERVIEW.format(commands="\n".join(rows))


def user_error(error: BaseException | None) -> UserError | None:
    """The UserError behind an error: jsonargparse wraps errors of constructors, a loader wraps those of its workers."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error and UserError(str(error).strip().rsplit("UserError: ", 1)[-1])


def silence_known_warnings() -> None:
    """Silences warnings that do not help a user of this command."""
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")  # of FSDP2; none is changed in place
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)


def execute(arguments: list[str]) -> None:
    """Runs a command line, without the program's name."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
    elif arguments[0] in COMMANDS:
        run_command(*arguments[:1], arguments[1:])
    elif arguments[0] in TRAINER and arguments[1:] in (["-h"], ["--help"]):
        from lightning_semgen.short_help import short_help

        print(short_help(arguments[0]))
    else:
        from lightning_semgen.trainer_cli import run

        run(arguments[:2] if arguments[1:] == ["--help", "all"] else arguments)


def main() -> None:
    """Runs the command line. A UserError ends it with one sentence and exit code 1."""
    silence_known_warnings()
    try:
        execute(sys.argv[1:])
    except Exception as error:
        if (mistake := user_error(error)) is None:
            raise
        sys.exit(f"lightning: {mistake}")
