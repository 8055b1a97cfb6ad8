"""Help: every command in one table, quick, and true."""

import subprocess
import sys

import pytest

from lightning_semgen.commands import COMMANDS
from lightning_semgen.commands.completion import whole_parser
from lightning_semgen.short_help import FIRST, TRAINER, documented


@pytest.mark.parametrize("arguments", [["--help"], ["pack", "--help"], ["fit", "--help"]])
def test_help_does_not_wait_for_torch(arguments):
    code = (
        "import sys, atexit; from lightning_semgen.cli import main;"
        "atexit.register(lambda: print('torch' in sys.modules)); main()"
    )
    said = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True).stdout
    assert said.startswith("usage: lightning") and said.endswith("False\n")


def test_all_commands_are_in_one_table(lightning, capsys):
    lightning("--help", small=False)
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in [*FIRST, *COMMANDS])
    assert "Text-to-video generation in semantic space" in said


@pytest.mark.parametrize("command", FIRST)
def test_short_help_names_options_that_there_are(command, lightning, capsys):
    lightning(command, "--help", small=False)
    said = capsys.readouterr().out
    groups = FIRST[command][2]
    assert all(f"--{group}.{name}" in said for group, names in groups.items() for name in names)
    texts = {"trainer": TRAINER} | {group: documented(group) for group in ("model", "data")}
    assert all(texts[group][name] for group, names in groups.items() for name in names)


def test_a_shell_completes_commands_and_options():
    script = whole_parser().get_completion_script("shtab-bash")
    assert "--data.train_shards" in script and "--shard_size" in script and "completion" in script
    assert len(script) < 1_000_000
