"""What a fit says of samples that it cannot use, and when it gives up."""

import json

import pytest
from conftest import CONFIGS, SMALL, on_two_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.shards.writer import write_shard
from data.toy.world import toy_clip
from lightning_semgen.trainer_cli import run as run_command

FIT = (
    "fit",
    "-c",
    f"{CONFIGS}/dim8.yaml",
    "--data.encoded=null",
    "--trainer.max_steps=4",
    "--model.compressor_steps=1",
)
STEPS = ("--model.compressor_steps=1", "--trainer.log_every_n_steps=1")


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    """Twelve clips to train on, of which two do not decode."""
    monkeypatch.chdir(tmp_path)
    rows = [toy_clip("train", index, 0) for index in range(12)]
    samples = [{"__key__": key, "mp4": mp4, "json": info} for key, mp4, info in rows]
    samples[3]["mp4"] = samples[8]["mp4"] = b"broken"
    write_shard(tmp_path / "shards/toy/train-0.tar", samples)
    write_shard(tmp_path / "shards/toy/heldout-0.tar", samples[:2])
    return tmp_path


def test_bad_samples_are_counted_and_named(damaged, lightning):
    with pytest.warns(UserWarning, match="is skipped: does not decode.*only counted"):
        lightning(*FIT, *STEPS)
    rows = [json.loads(line) for line in (damaged / "runs/dim8/rejected.jsonl").read_text().splitlines()]
    assert {row["sample"] for row in rows} == {"train-000003", "train-000008"} and len(rows) == 2
    assert {row["cause"] for row in rows} == {"does not decode: InvalidDataError"}
    curves = EventAccumulator(str(damaged / "runs/dim8")).Reload()
    assert curves.Scalars("rejected/does not decode: InvalidDataError")[-1].value >= 2


@pytest.mark.slow
def test_two_ranks_count_what_one_counts(damaged):
    counts = {}
    for run, size, fit in (("one", 4, lambda *args: run_command(list(args))), ("two", 2, on_two_ranks)):
        fit(*FIT, *STEPS, *SMALL, f"--data.batch_size={size}", f"--trainer.default_root_dir={run}")
        points = EventAccumulator(run).Reload().Scalars("rejected/does not decode: InvalidDataError")
        counts[run] = [(point.step, point.value) for point in points]
    assert counts["one"] == counts["two"] and counts["one"][-1][1] >= 2


def test_too_many_bad_samples_stop_the_run(damaged, fails, monkeypatch):
    monkeypatch.setattr("data.rejected.ENOUGH", 10)
    said = fails(*FIT, *STEPS)
    assert "samples were rejected, more than data.max_bad_share 0.05" in said and "does not decode" in said


def test_too_many_stop_an_encode_too(damaged, fails, monkeypatch):
    monkeypatch.setattr("data.rejected.ENOUGH", 10)
    said = fails("encode", "-c", f"{CONFIGS}/dim8.yaml", "--data.toy_clips=0", "--data.encoded=made", small=False)
    assert "2 of 12 samples were rejected" in said and not list((damaged / "made").rglob("*.tar"))


def test_a_larger_share_may_be_allowed(damaged, lightning, monkeypatch):
    monkeypatch.setattr("data.rejected.ENOUGH", 10)
    lightning(*FIT, *STEPS, "--data.max_bad_share=0.5")
    assert (damaged / "runs/dim8/checkpoints/last.ckpt").is_file()
