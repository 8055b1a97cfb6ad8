"""Three real packages, one command, a README that tells the truth about the tree."""

import re
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("package", ["lightning_semgen", "encoders", "data"])
def test_packages_come_from_this_repository(package):
    assert Path(import_module(package).__file__).parent == ROOT / package


def test_the_command_is_ours():
    (script,) = entry_points(group="console_scripts", name="lightning")
    assert script.value == "lightning_semgen.cli:main"


def test_readme_names_every_file_of_the_packages_and_every_config():
    readme = (ROOT / "README.md").read_text()
    packages = [p for name in ("lightning_semgen", "encoders", "data") for p in (ROOT / name).glob("[a-z]*.py")]
    missing = [p.name for p in [*packages, *(ROOT / "configs").rglob("*.yaml")] if p.name not in readme]
    assert not missing


def test_readme_names_no_file_that_is_not_there():
    readme = (ROOT / "README.md").read_text()
    files = set(re.findall(r"`((?:configs|docs|data|encoders|lightning_semgen|benchmarks)/[\w/.]+\.\w+)`", readme))
    assert files and all((ROOT / name).is_file() for name in files)


def test_shipped_weights_are_small():
    assert sum(p.stat().st_size for p in (ROOT / "encoders/weights").rglob("*")) <= 4 * 2**20
