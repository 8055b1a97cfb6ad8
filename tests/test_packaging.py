"""Three real packages, one command, a README that names what is there."""

import re
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.parametrize("package", ["lightning_semgen", "encoders", "data"])
def test_packages_come_from_this_repository(package):
    assert Path(import_module(package).__file__).parent == ROOT / package


def test_the_command_is_ours():
    (script,) = entry_points(group="console_scripts", name="lightning")
    assert script.value == "lightning_semgen.cli:main"


def test_readme_names_every_room_and_every_config():
    readme = (ROOT / "README.md").read_text()
    packages = ("lightning_semgen", "encoders", "data")
    rooms = [f"{path.parent.name}/" for name in packages for path in (ROOT / name).rglob("__init__.py")]
    configs = [path.name for path in (ROOT / "configs").rglob("*.yaml")]
    assert not [name for name in rooms + configs if name not in readme]


def test_readme_names_no_file_that_is_not_there():
    readme = (ROOT / "README.md").read_text()
    files = set(re.findall(r"`((?:configs|docs|data|encoders|lightning_semgen|benchmarks)/[\w/.]+\.\w+)`", readme))
    assert files and all((ROOT / name).is_file() for name in files)


def test_shipped_weights_are_small():
    assert sum(p.stat().st_size for p in (ROOT / "encoders/weights").rglob("*")) <= 4 * 2**20
