"""What a checkpoint must stand: harmful contents, full disks, crashes, weights that are not finite, other options."""

import errno
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from conftest import CONFIGS, SMALL, on_two_ranks, see
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.multiprocessing import ProcessExitedException

from lightning_semgen.cli import main
from lightning_semgen.errors import UserError
from lightning_semgen.runs import load_checkpoint
from lightning_semgen.training.checkpoints import (
    FACTS,
    METADATA,
    before_path,
    check_harmless,
    is_checkpoint,
    put_in_place,
    unfinished_path,
)
from lightning_semgen.training.ema import update_ema
from lightning_semgen.training.optimizer import adamw, factor, follow_config

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


def test_a_checkpoint_is_written_beside_its_place_alone(runs, lightning, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "no such folder")
    lightning(*to("file", 3))
    assert load_checkpoint("file")["global_step"] == 3
    assert [path.name for path in Path("file/checkpoints").iterdir()] == ["last.ckpt"]


def full(*args, **kwargs) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_some(checkpoint: dict, file) -> None:
    """What torch may do on a full disk: it writes as far as it gets, then says something of its own."""
    file.write(b"PK")
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")


@pytest.mark.parametrize("save", [full, save_some])
def test_a_full_disk_is_one_sentence_and_keeps_the_checkpoint_before(save, runs, fails, monkeypatch):
    monkeypatch.setattr("lightning_semgen.training.checkpoints.torch.save", save)
    said = fails(*to("file", 3))
    assert "could not be written to" in said and "the one before is kept" in said and "--ckpt_path last" in said
    assert (os.strerror(errno.ENOSPC) if save is full else "the disk is full") in said
    said = fails(*to("new", 3))
    assert "there is none before it" in said
    monkeypatch.undo()
    monkeypatch.chdir(runs)
    assert load_checkpoint("file")["global_step"] == 2
    assert [path.name for path in Path("file/checkpoints").iterdir()] == ["last.ckpt"]
    assert not list(Path("new/checkpoints").iterdir())


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_share_keeps_the_folder_before(runs, capfd, monkeypatch):
    before = load_checkpoint("folder")
    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    with pytest.raises(ProcessExitedException):
        on_two_ranks(*to("folder", 3, *SMALL, "--trainer.strategy=fsdp2_dcp"))
    assert "the one before is kept" in capfd.readouterr().err
    assert [path.name for path in Path("folder/checkpoints").iterdir()] == ["last.ckpt"]
    torch.testing.assert_close(load_checkpoint("folder")["state_dict"], before["state_dict"], rtol=0, atol=0)


class Crash(BaseException):
    """The machine stops."""


def crash_at(step: int, monkeypatch) -> None:
    """The machine stops at that change of the file system, of a folder to be deleted in the middle."""
    done = [0]

    def counted(change: Callable, begin: Callable = lambda path: None) -> Callable:
        def changed(path, *args, **kwargs):
            done[0] += 1
            if done[0] > step:
                begin(path)
                raise Crash
            return change(path, *args, **kwargs)

        return changed

    for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    remove = os.remove
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree, lambda path: remove(Path(path) / FACTS)))


def write(path: Path, kind: str, step: int) -> None:
    """A small checkpoint of that step."""
    if kind == "folder":
        dcp.save({"state_dict": {"step": torch.tensor(step)}}, checkpoint_id=path, no_dist=True)
        path /= FACTS
    if kind != "nothing":
        torch.save({"global_step": step}, path)


KINDS = [("file", "file"), ("file", "folder"), ("folder", "file"), ("folder", "folder"), ("nothing", "folder")]


@pytest.mark.parametrize(("old", "new"), KINDS)
@pytest.mark.parametrize("leftover", ["nothing", "folder"])
@pytest.mark.parametrize("step", range(5))
def test_a_crash_anywhere_between_two_checkpoints_loses_none(step, old, new, leftover, tmp_path, monkeypatch):
    path = tmp_path / LAST
    path.parent.mkdir()
    write(path, old, 1)
    write(unfinished_path(path), new, 2)
    write(before_path(path), leftover, 0)
    with monkeypatch.context() as patch, suppress(Crash):
        crash_at(step, patch)
        put_in_place(path)
    assert is_checkpoint(path)
    assert load_checkpoint(tmp_path)["global_step"] in (1, 2)
    if not unfinished_path(path).exists():
        write(unfinished_path(path), new, 3)
    put_in_place(path)
    assert list(path.parent.iterdir()) == [path] and load_checkpoint(tmp_path)["global_step"] in (2, 3)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_was_never_finished_is_not_taken_for_a_checkpoint(kind, tmp_path):
    path = tmp_path / "last.ckpt"
    write(unfinished_path(path), kind, 1)
    cut = unfinished_path(path) / FACTS if kind == "folder" else unfinished_path(path)
    cut.write_bytes(cut.read_bytes()[:-1])
    write(before_path(path), kind, 0)
    assert is_checkpoint(path) and not before_path(path).exists()
    facts = torch.load(path / FACTS if kind == "folder" else path)
    assert facts["global_step"] == 0


def test_the_next_command_puts_a_checkpoint_back(runs, lightning, fails):
    place = Path("folder") / LAST
    place.rename(before_path(place))
    assert "already holds a trained run" in fails(*to("new", 3, "--trainer.default_root_dir=folder"))
    place.rename(before_path(place))
    lightning(*to("folder", 3))
    assert load_checkpoint("folder")["global_step"] == 3


def check_follows(run: str, lr: float, weight_decay: float) -> None:
    """A run of 4 steps, the last 2 of which have these options."""
    checkpoint = load_checkpoint(run)
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    assert [group["initial_lr"] for group in groups] == checkpoint["lr_schedulers"][0]["base_lrs"] == [lr] * 3
    assert [group["weight_decay"] for group in groups] == [weight_decay, 0.0, 0.0]
    assert [tuple(group["betas"]) for group in groups] == [(0.9, 0.99)] * 3
    config = yaml.safe_load(Path(run, "config.yaml").read_text())["model"]["init_args"]
    assert (config["lr"], config["weight_decay"]) == (lr, weight_decay)
    rates = EventAccumulator(run).Reload().Scalars("train/learning_rate")
    assert [rate.value for rate in rates][2:] == pytest.approx([lr * factor(step, 2, 4) for step in (2, 3)])


OTHER = ("--model.lr=0.0005", "--model.weight_decay=0.2")


@pytest.mark.parametrize("run", ["file", "folder"])
def test_a_resumed_fit_follows_its_config(run, runs, lightning):
    lightning(*to(run, 4, *OTHER))
    check_follows(run, 0.0005, 0.2)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2_dcp"])
def test_so_it_does_on_two_ranks(strategy, runs):
    run = "folder" if strategy == "fsdp2_dcp" else "file"
    on_two_ranks(*to(run, 4, *SMALL, "--data.batch_size=2", f"--trainer.strategy={strategy}", *OTHER))
    check_follows(run, 0.0005, 0.2)


def optimized(steps: int, lr: float) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    weight, bias, other = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    made = adamw([("weight", weight), ("bias", bias)], [other], lr, 0.01, 2, 9, 5)
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    for _ in range(steps):
        for parameter in (weight, bias, other):
            parameter.grad = torch.ones(3)
        optimizer.step()
        schedule.step()
    return optimizer, schedule


@pytest.mark.parametrize("steps", [1, 4, 6])
def test_an_unchanged_config_changes_no_bit(steps):
    optimizer, schedule = optimized(steps, 1.3e-3)
    state, scheduled = optimizer.state_dict()["param_groups"], schedule.state_dict()
    resumed, goes_on = optimized(0, 1.3e-3)
    resumed.load_state_dict(optimizer.state_dict())
    goes_on.load_state_dict(schedule.state_dict())
    follow_config(resumed, goes_on)
    assert resumed.state_dict()["param_groups"] == state and goes_on.state_dict() == scheduled


def spoil(monkeypatch, part: str, value: float, rank: int = 0) -> None:
    """Has a part of the stage on that rank go bad after the third step, the loss of which was finite."""

    def update(ema: torch.nn.Module, generator: torch.nn.Module, decay: float, step: int) -> None:
        update_ema(ema, generator, decay, step)
        this = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        if step == 2 and this == rank:  # steps that were made before this one
            for parameter in {"ema": ema, "generator": generator}[part].parameters():
                with torch.no_grad():
                    getattr(parameter, "to_local", lambda whole=parameter: whole)().fill_(value)

    monkeypatch.setattr("lightning_semgen.training.module.update_ema", update)


@pytest.mark.parametrize(("part", "value"), [("ema", float("inf")), ("generator", float("nan"))])
def test_weights_that_are_not_finite_are_not_saved(part, value, runs, fails, monkeypatch):
    spoil(monkeypatch, part, value)
    said = fails(*to("file", 4, "--checkpoint.every_n_train_steps=1"))
    assert "Weights were not finite at step 3 and are not saved: lower model.lr" in said
    assert load_checkpoint("file")["global_step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2_dcp"])
def test_nor_where_they_are_so_on_one_rank_alone(strategy, runs, capfd, monkeypatch):
    spoil(monkeypatch, "ema", float("nan"), rank=1)
    options = ("--data.batch_size=2", f"--trainer.strategy={strategy}", "--checkpoint.every_n_train_steps=1")
    with pytest.raises(ProcessExitedException):
        on_two_ranks(*to("folder", 4, *SMALL, *options))
    assert "Weights were not finite at step 3" in capfd.readouterr().err
    assert load_checkpoint("folder")["global_step"] == 2
