"""The command as a user has it: every config runs, runs are folders, bad input is one sentence."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CONFIGS
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_semgen.runs import load_checkpoint, load_stage

FIT = ("--trainer.max_steps=2", "--model.compressor_steps=1")


@pytest.fixture
def trained(workspace, lightning):
    """runs/dim8 and runs/latent_dim8, two steps each."""
    lightning("fit", "-c", f"{CONFIGS}/dim8.yaml", *FIT)
    lightning("fit", "-c", f"{CONFIGS}/latent_dim8.yaml", *FIT)
    return workspace


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_runs_a_step(path, workspace, lightning):
    text = path.read_text()
    assert f"lightning fit -c configs/{path.relative_to(CONFIGS)}" in text
    if run := yaml.safe_load(text)["model"].get("init_args", {}).get("compressor"):
        first = next(CONFIGS.rglob(f"{Path(run).name}.yaml"))
        lightning("fit", "-c", str(first), "--trainer.max_steps=1")
    small = "toy/" not in str(path.relative_to(CONFIGS))
    others = ["--data.toy_clips=0", "--data.batch_size=4", "--data.num_workers=0", "--trainer.limit_val_batches=1"]
    lightning("fit", "-c", str(path), "--trainer.max_steps=1", *([] if small else others), small=small)
    assert (workspace / "runs" / path.stem / "checkpoints/last.ckpt").is_file()


def test_text_to_videos_and_semantics(trained, lightning):
    (trained / "prompts.txt").write_text("a small red circle moves left\na big blue square goes up\n")
    prompts = ("--data.prompts", "prompts.txt")
    predict = ("predict", "-c", "runs/latent_dim8/config.yaml", "--model.semantic_run", "runs/dim8", *prompts)
    lightning(*predict)
    (first, second) = sorted((trained / "runs/latent_dim8/predict").glob("*.mp4"))
    assert first.name == "0000-a-small-red-circle-moves-left-seed0.mp4"
    before = first.read_bytes()
    first.unlink()
    lightning(*predict)
    assert first.read_bytes() == before  # the same prompt and seed, the same video
    lightning("predict", "-c", "runs/dim8/config.yaml", *prompts)
    (file, _) = sorted((trained / "runs/dim8/predict").glob("*.safetensors"))
    with safe_open(file, "pt") as semantics:
        assert semantics.get_tensor("semantics").shape == (2, 3, 3, 8)
        assert semantics.metadata()["prompt"] == "a small red circle moves left"


def test_test_leaves_numbers_and_pictures(trained, lightning):
    lightning("test", "-c", "runs/latent_dim8/config.yaml", "--trainer.limit_test_batches=1")
    folder = trained / "runs/latent_dim8/test"
    numbers = json.loads((folder / "numbers.json").read_text())
    assert 0 <= numbers["test/colour"] <= 1 and len(list(folder.glob("*.mp4"))) == 4
    assert (folder / "contact_sheet.png").stat().st_size > 1000


def test_a_run_is_a_folder(trained):
    run = trained / "runs/dim8"
    assert {path.name.split(".")[0] for path in run.iterdir()} >= {"config", "checkpoints", "events"}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["default_root_dir"] is None  # so that the folder can be moved
    (trained / "elsewhere").mkdir()
    run.rename(trained / "elsewhere/moved")
    stage = load_stage(trained / "elsewhere/moved")
    state = load_checkpoint(trained / "elsewhere/moved")["state_dict"]
    assert all(torch.equal(value, state[name]) for name, value in stage.state_dict().items())
    assert [path.name for path in (trained / "elsewhere/moved/checkpoints").iterdir()] == ["last.ckpt"]


def test_tensorboard_has_the_basics(trained):
    tags = {run: EventAccumulator(str(trained / "runs" / run)).Reload().Tags() for run in ("dim8", "latent_dim8")}
    assert {"val/flow_loss", "val/semantic_gap"} <= set(tags["latent_dim8"]["scalars"])
    assert tags["latent_dim8"]["images"] == ["videos"]  # both runs are there
    assert not tags["dim8"]["images"]


def test_resume_drops_points_past_its_step(workspace, lightning):
    fit = ("fit", "-c", f"{CONFIGS}/dim8.yaml", "--trainer.log_every_n_steps=1")
    checkpoint = workspace / "runs/dim8/checkpoints/last.ckpt"
    lightning(*fit, "--trainer.max_steps=3")
    saved = checkpoint.read_bytes()
    lightning(*fit, "--trainer.max_steps=6", "--ckpt_path=last")
    checkpoint.write_bytes(saved)  # as if those three steps had not been saved
    lightning(*fit, "--trainer.max_steps=4", "--ckpt_path=last")
    events = EventAccumulator(str(workspace / "runs/dim8")).Reload()
    assert {event.step for event in events.Scalars("train/flow_loss")} == {0, 1, 2, 3}


# Bad input: one clear sentence, exit code not 0


def test_missing_shards(workspace, fails):
    said = fails("fit", "-c", f"{CONFIGS}/dim8.yaml", "--data.train_shards=nowhere/*.tar")
    assert "There are no shards at nowhere/*.tar" in said


def test_no_caption_in_any_sample(workspace, fails):
    from data.shards import write_shard

    write_shard(workspace / "mute.tar", [{"__key__": "a", "mp4": b"", "json": {}}])
    said = fails("fit", "-c", f"{CONFIGS}/dim8.yaml", "--data.train_shards=mute.tar")
    assert "None of the 1 samples" in said and "has a caption" in said


def test_an_unknown_encoder(workspace, fails):
    said = fails("fit", "-c", f"{CONFIGS}/dim8.yaml", "--model.encoder=dinosaur")
    assert "There is no encoder 'dinosaur'; known encoders: toy" in said


def test_a_d_that_the_loaded_run_was_not_trained_with(trained, fails):
    said = fails(
        "fit", "-c", f"{CONFIGS}/latent_dim8.yaml", "--model.semantic_dim=64", "--trainer.default_root_dir=new"
    )
    assert "runs/dim8 was trained with semantic_dim 8, this config says 64" in said


def test_an_empty_prompt_file_and_none(trained, fails):
    (trained / "empty.txt").write_text("\n")
    predict = ("predict", "-c", "runs/latent_dim8/config.yaml")
    assert "empty.txt is empty" in fails(*predict, "--data.prompts=empty.txt")
    assert "--data.prompts" in fails(*predict)


def test_predict_without_a_trained_run(workspace, fails):
    said = fails("predict", "-c", f"{CONFIGS}/dim8.yaml", "--data.prompts=p.txt")
    assert "There is no trained run in runs/dim8" in said


def test_fit_into_a_used_folder(trained, fails):
    said = fails("fit", "-c", f"{CONFIGS}/dim8.yaml")
    assert "runs/dim8 already holds a trained run" in said and "--ckpt_path last" in said


def test_resume_where_nothing_is(workspace, fails):
    assert "There is no trained run in runs/dim8" in fails("fit", "-c", f"{CONFIGS}/dim8.yaml", "--ckpt_path=last")


def test_a_misspelt_key(workspace, fails):
    assert "learning_rat" in fails("fit", "-c", f"{CONFIGS}/dim8.yaml", "--model.learning_rat=1")


def test_semantics_of_another_compressor(trained, lightning, fails):
    lightning("fit", "-c", f"{CONFIGS}/dim8.yaml", *FIT, "--trainer.default_root_dir=other", "--seed_everything=1")
    (trained / "p.txt").write_text("a red circle\n")
    predict = ("predict", "-c", "runs/latent_dim8/config.yaml", "--data.prompts=p.txt", "--model.semantic_run=other")
    assert "The compressor of other is not the one" in fails(*predict)


def test_encoded_shards_of_other_parts(trained, fails):
    said = fails("fit", "-c", f"{CONFIGS}/dim8.yaml", "--data.semantic_fps=3.2", "--trainer.default_root_dir=new")
    assert "semantic_fps" in said and "delete that folder" in said
