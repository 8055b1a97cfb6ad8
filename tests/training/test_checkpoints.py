"""What a checkpoint must stand: harmful contents, full disks, crashes, weights that are not finite, other options."""

import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import CONFIGS, SMALL, on_two_ranks, see
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.multiprocessing import ProcessExitedException

from lightning_semgen.cli import main
from lightning_semgen.errors import UserError
from lightning_semgen.runs import load_checkpoint
from lightning_semgen.training.checkpoints import FACTS, METADATA, check_harmless

LAST = Path("checkpoints/last.ckpt")
FIT = (
    "fit", "-c", f"{CONFIGS}/dim8.yaml", "--model.compressor_steps=1", "--model.warmup_steps=2",
    "--trainer.log_every_n_steps=1",
)  # fmt: skip


def to(run: str, steps: int, *args: str) -> list[str]:
    """A fit of that run to so many steps, which goes on where there is one."""
    resume = ["--ckpt_path=last"] if Path(run).exists() else []
    return [*FIT, f"--trainer.default_root_dir={run}", f"--trainer.max_steps={steps}", *resume, *args]


@pytest.fixture(scope="module")
def fitted(shards, tmp_path_factory) -> Path:
    """A folder with two runs of two steps: `file`, and `folder`, whose checkpoint is one."""
    where = see(shards, tmp_path_factory.mktemp("checkpoints"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        patch.setattr("lightning_semgen.stages.semantic_space.MEASURED_CLIPS", 16)
        patch.setattr(sys, "argv", ["lightning", *to("file", 2), *SMALL])
        main()
        shutil.copytree("file", "folder")
        as_folder(Path("folder") / LAST)
    return where


@pytest.fixture
def runs(fitted, tmp_path, monkeypatch) -> Path:
    """The current folder, with copies of both runs."""
    shutil.copytree(fitted, tmp_path / "runs", symlinks=True)
    monkeypatch.chdir(tmp_path / "runs")
    return tmp_path / "runs"


def as_folder(path: Path) -> None:
    """Makes a folder of a file, as a strategy with _dcp would have saved it."""
    checkpoint = torch.load(path)
    path.unlink()
    weights, (optimizer,) = checkpoint.pop("state_dict"), checkpoint.pop("optimizer_states")
    dcp.save({"state_dict": weights, "optimizer_0": optimizer}, checkpoint_id=path, no_dist=True)
    torch.save(checkpoint, path / FACTS)


class Canary:
    """Leaves a file behind where it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("canary"),)


def hide_in_metadata(folder: Path) -> None:
    (folder / METADATA).write_bytes(pickle.dumps(Canary()))


def hide_in_other_metadata(folder: Path) -> None:
    """Where torch looks when the first fails after it was read."""
    metadata = pickle.loads((folder / METADATA).read_bytes())
    metadata.storage_meta = 5
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    (folder / f"__0{METADATA}").write_bytes(pickle.dumps(Canary()))


def hide_in_item(folder: Path) -> None:
    """In the place of what is no tensor, as a learning rate."""
    metadata = pickle.loads((folder / METADATA).read_bytes())
    (name,) = [index.fqn for index in metadata.storage_data if index.fqn.endswith("param_groups.0.lr")]
    torch.save(Canary(), folder / "evil.distcp")
    place = metadata.storage_data[MetadataIndex(name)]
    place.relative_path, place.offset, place.length = "evil.distcp", 0, (folder / "evil.distcp").stat().st_size
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


HIDDEN = [hide_in_metadata, hide_in_other_metadata, hide_in_item]


@pytest.mark.parametrize("hide", HIDDEN)
def test_somebodys_sharded_checkpoint_executes_nothing(hide, runs, fails):
    hide(Path("folder") / LAST)
    with pytest.raises(UserError, match=r"folder/checkpoints/last.ckpt is not opened"):
        load_checkpoint("folder")
    assert "is not opened" in fails("export", "folder", "exported", small=False)
    assert "is not opened" in fails(*to("folder", 3))
    assert "is not opened" in fails(*to("new", 3, "--ckpt_path=folder"))
    assert not Path("canary").exists()


def test_the_class_that_is_not_allowed_is_named(runs):
    hide_in_metadata(Path("folder") / LAST)
    with pytest.raises(UserError, match=r"it names pathlib\.Path\.touch|it names builtins\.getattr"):
        load_checkpoint("folder")


@pytest.mark.slow
@pytest.mark.parametrize("hide", HIDDEN)
def test_nor_where_each_rank_reads_its_share(hide, runs, capfd):
    hide(Path("folder") / LAST)
    with pytest.raises(ProcessExitedException):
        on_two_ranks(*to("folder", 3, *SMALL, "--trainer.strategy=fsdp2"))
    assert "is not opened" in capfd.readouterr().err
    assert not Path("canary").exists()


def test_a_file_that_is_both_an_archive_and_a_pickle_is_refused(tmp_path):
    """fsdp reads the archive at the end, torch the pickle at the start."""
    torch.save({"state_dict": {}}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": {}}, tmp_path / "new.ckpt")
    check_harmless(tmp_path / "new.ckpt")
    with (tmp_path / "old.ckpt").open("ab") as file:
        file.write((tmp_path / "new.ckpt").read_bytes())
    with pytest.raises(UserError, match="is not opened"):
        check_harmless(tmp_path / "old.ckpt")


def test_a_whole_folder_reads_as_the_file_it_was(runs):
    file, folder = load_checkpoint("file"), load_checkpoint("folder")
    torch.testing.assert_close(folder["state_dict"], file["state_dict"], rtol=0, atol=0)
    assert folder["global_step"] == file["global_step"] == 2
