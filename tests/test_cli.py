"""The command as a user has it: every config runs, runs are folders, bad input is one sentence."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CONFIGS, SMALL, see
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_semgen.cli import main
from lightning_semgen.runs import load_checkpoint, load_stage

NEW = ("--trainer.default_root_dir=new",)
FIT = ("--trainer.max_steps=2", "--model.compressor_steps=1", "--trainer.log_every_n_steps=1")


@pytest.fixture(scope="module")
def fitted(shards, tmp_path_factory) -> Path:
    """A folder with runs/dim8 and runs/latent_dim8, two steps each."""
    folder = see(shards, tmp_path_factory.mktemp("fitted"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_semgen.stages.semantic_space.MEASURED_CLIPS", 16)
        patch.chdir(folder)
        for name in ("dim8", "latent_dim8"):
            patch.setattr(sys, "argv", ["lightning", "fit", "-c", f"{CONFIGS}/{name}.yaml", *FIT, *SMALL])
            main()
    return folder


@pytest.fixture
def trained(fitted, workspace) -> Path:
    """The current folder, with copies of those runs and of what was encoded for them."""
    for name in ("runs", "shards/toy/features", "shards/toy/latents"):
        shutil.copytree(fitted / name, workspace / name)
    return workspace


TESTED_ELSEWHERE = ("encoders", "paper")  # test_published_encoders.py, test_paper_configs.py
ANYWHERE = sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name not in TESTED_ELSEWHERE)


@pytest.mark.parametrize("path", ANYWHERE, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_runs_a_step(path, workspace, lightning):
    text = path.read_text()
    assert f"lightning fit -c configs/{path.relative_to(CONFIGS)}" in text
    run = yaml.safe_load(text)["model"].get("init_args", {}).get("compressor", "learn")
    if run != "learn":
        first = path.parent / f"{Path(run).name}.yaml"
        lightning("fit", "-c", str(first), *FIT)
    if path.parent.name == "toy":
        few = ["--data.batch_size=4", "--data.num_workers=0", "--trainer.limit_val_batches=1", "--data.toy_clips=0"]
        shards = [
            f"--data.{split}_shards=shards/toy/{name}-*.tar" for split, name in (("train", "train"), ("val", "heldout"))
        ]
        lightning("fit", "-c", str(path), "--trainer.max_steps=1", *few, *shards, small=False)
    else:
        lightning("fit", "-c", str(path), "--trainer.max_steps=1", "--model.compressor_steps=0")
    assert (workspace / "runs" / path.stem / "checkpoints/last.ckpt").is_file()


def test_text_to_videos_and_semantics(trained, lightning):
    (trained / "prompts.txt").write_text("a small red circle moves left\na big blue pillar goes up\n")
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


def test_a_fresh_process_gives_the_same_video(trained, lightning):
    (trained / "p.txt").write_text("a small red circle moves left\n")
    predict = ("predict", "-c", "runs/latent_dim8/config.yaml", "--data.prompts=p.txt", "--seed_everything=3")
    lightning(*predict)
    (video,) = (trained / "runs/latent_dim8/predict").glob("*-seed3.mp4")
    before = video.read_bytes()
    video.unlink()
    environment = os.environ | {"PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "lightning_semgen", *predict, *SMALL], env=environment, check=True)
    assert video.read_bytes() == before


def test_encode_then_fit_reads_what_was_encoded(workspace, lightning):
    lightning("encode", "-c", f"{CONFIGS}/paper_recipe/paper_latent_dim8.yaml")
    shards = sorted((workspace / "shards/toy/latents").rglob("*.tar"))
    written = [path.stat().st_mtime_ns for path in shards]
    assert len(shards) == 2
    lightning("fit", "-c", f"{CONFIGS}/paper_recipe/paper_latent_dim8.yaml", *FIT)
    assert [path.stat().st_mtime_ns for path in sorted((workspace / "shards/toy/latents").rglob("*.tar"))] == written
    # Encoded shards are shards: a config may name them itself.
    names = ["--data.train_shards=shards/toy/latents/train/*.tar", "--data.val_shards=shards/toy/latents/val/*.tar"]
    lightning(
        "fit", "-c", f"{CONFIGS}/paper_recipe/paper_latent_dim8.yaml", *FIT, *names, "--data.encoded=null",
        "--trainer.default_root_dir=direct",
    )  # fmt: skip
    one, two = (load_checkpoint(run)["state_dict"] for run in ("runs/paper_latent_dim8", "direct"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_encode_on_two_devices_writes_the_same_bytes(workspace, lightning):
    encode = ("encode", "-c", f"{CONFIGS}/paper_recipe/paper_latent_dim8.yaml", "--data.train_shards=shards/toy/*.tar")
    lightning(*encode, "--data.encoded=one")
    lightning(*encode, "--data.encoded=two", "--trainer.devices=2", "--trainer.strategy=ddp_fork")
    one, two = ({p.relative_to(f): p.read_bytes() for p in Path(f).rglob("*.tar")} for f in ("one", "two"))
    assert len(one) == 3 and one == two


def test_several_configs_are_encoded_in_one_pass(workspace, lightning, fails):
    configs = [f"{CONFIGS}/dim8.yaml", f"{CONFIGS}/paper_recipe/paper_latent_dim8.yaml"]
    both = ("encode", *(word for config in configs for word in ("-c", config)))
    lightning(*both)
    for config, name in zip(configs, ("features", "latents"), strict=True):
        lightning("encode", "-c", config, "--data.encoded", f"apart/{name}")
        together, apart = (
            {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.suffix == ".tar" or p.stem == "fingerprint"}
            for f in (Path("shards/toy", name), Path("apart", name))
        )
        assert len(together) == 4 and together == apart
    Path("longer.yaml").write_text(Path(configs[0]).read_text().replace("  toy_clips: 3072", "  num_frames: 97"))
    said = fails(*both, "-c", "longer.yaml", "--data.encoded=one")
    assert "needs a data.encoded of its own" in said
    Path("other.yaml").write_text(Path("longer.yaml").read_text().replace("toy/features", "toy/other"))
    said = fails(*both, "-c", "other.yaml")
    assert "data.num_frames is 49 in one config and 97 in another" in said


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--model.encoder=none"], ["--model.encoder=vae", "--model.compressor=learn"]])
def test_the_papers_baselines_run_online(workspace, lightning, options):
    fit = (
        "fit",
        "-c",
        f"{CONFIGS}/latent_dim8.yaml",
        *FIT,
        "--data.encoded=null",
        "--trainer.accumulate_grad_batches=2",
    )
    lightning(*fit, *options, "--trainer.limit_train_batches=2")


def test_a_latent_run_outlives_the_folder_it_learnt_from(trained, lightning):
    (trained / "runs/dim8").rename(trained / "moved")
    (trained / "runs/latent_dim8").rename(trained / "moved_too")
    (trained / "p.txt").write_text("a red circle\n")
    lightning("validate", "-c", "moved_too/config.yaml")
    lightning("predict", "-c", "moved_too/config.yaml", "--model.semantic_run=moved", "--data.prompts=p.txt")
    assert len(list((trained / "moved_too/predict").glob("*.mp4"))) == 1


@pytest.mark.slow
def test_encoded_semantics_outlive_the_run_that_learnt_their_compressor(trained, lightning, fails):
    semantics = ("-c", f"{CONFIGS}/latent_dim8.yaml", "--model.encode_semantics=true", "--data.encoded=semantics")
    lightning("encode", *semantics)
    shards = {path: path.stat().st_mtime_ns for path in (trained / "semantics").rglob("*.tar")}
    lightning("fit", *semantics, *FIT, *NEW)
    lightning("fit", "-c", f"{CONFIGS}/dim8.yaml", *FIT, "--trainer.default_root_dir=other", "--seed_everything=1")
    said = fails("fit", *semantics, *FIT, "--model.compressor=other", "--trainer.default_root_dir=newer")
    assert "were made with compressor" in said and "delete that folder" in said
    (trained / "runs/dim8").rename(trained / "moved")
    lightning("fit", "-c", "new/config.yaml", *FIT, "--trainer.max_steps=3", "--ckpt_path=last")
    lightning("validate", "-c", "new/config.yaml")
    assert shards == {path: path.stat().st_mtime_ns for path in (trained / "semantics").rglob("*.tar")}


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
    both = {"train/flow_loss", "train/gradient_norm", "train/learning_rate", "val/flow_loss"}
    both |= {f"speed/{tag}" for tag in ("clips_per_second", "tokens_per_second", "step_seconds", "data_wait_share")}
    learns = {"train/kl", "train/reconstruction", "train/compressor_learning_rate"}
    assert both | learns <= set(tags["dim8"]["scalars"])
    assert both | {"val/semantic_gap"} <= set(tags["latent_dim8"]["scalars"])
    assert any(tag.startswith("train/flow_loss t 0.") for tag in tags["dim8"]["scalars"])


def test_resume_drops_points_past_its_step(workspace, lightning):
    fit = ("fit", "-c", f"{CONFIGS}/dim8.yaml", "--trainer.log_every_n_steps=1", "--model.compressor_steps=1")
    checkpoint = workspace / "runs/dim8/checkpoints/last.ckpt"
    lightning(*fit, "--trainer.max_steps=3")
    saved = checkpoint.read_bytes()
    lightning(*fit, "--trainer.max_steps=6", "--ckpt_path=last")
    checkpoint.write_bytes(saved)  # as if those three steps had not been saved
    lightning(*fit, "--trainer.max_steps=4", "--ckpt_path=last")
    events = EventAccumulator(str(workspace / "runs/dim8")).Reload()
    assert {event.step for event in events.Scalars("train/flow_loss")} == {0, 1, 2, 3}


def test_a_fit_may_log_nothing(workspace, lightning):
    fit = ("fit", "-c", f"{CONFIGS}/dim8.yaml", "--trainer.log_every_n_steps=0", "--model.compressor_steps=1")
    lightning(*fit, "--trainer.max_steps=2")
    tags = EventAccumulator(str(workspace / "runs/dim8")).Reload().Tags()["scalars"]
    assert "val/flow_loss" in tags and not any(tag.startswith("train/") for tag in tags)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_curves_of_training_have_points_at_the_same_steps(accumulate, workspace, lightning):
    fit = ("fit", "-c", f"{CONFIGS}/dim8.yaml", "--trainer.log_every_n_steps=2", "--model.compressor_steps=1")
    fit += (f"--trainer.accumulate_grad_batches={accumulate}",)
    lightning(*fit, "--trainer.max_steps=3")
    lightning(*fit, "--trainer.max_steps=6", "--ckpt_path=last")
    events = EventAccumulator(str(workspace / "runs/dim8")).Reload()
    steps = {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"] if tag.startswith("train/")}
    assert all(points == [1, 3, 5] for tag, points in steps.items() if " t " not in tag), steps
    assert "train/gradient_norm" in steps


# Bad input: one clear sentence, exit code not 0


def test_missing_shards(workspace, fails):
    said = fails("fit", "-c", f"{CONFIGS}/dim8.yaml", "--data.train_shards=nowhere/*.tar")
    assert "There are no shards at nowhere/*.tar" in said


def test_no_caption_in_any_sample(workspace, fails):
    from data.shards.writer import write_shard

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


def test_a_compressor_that_is_still_being_learnt(workspace, lightning, fails):
    lightning("fit", "-c", f"{CONFIGS}/dim8.yaml", "--trainer.max_steps=4", "--model.compressor_steps=3")
    state = torch.load("runs/dim8/checkpoints/last.ckpt")
    state["semantics"]["frozen"] = False
    torch.save(state, "runs/dim8/checkpoints/last.ckpt")
    assert "still being learnt at step 4" in fails("fit", "-c", f"{CONFIGS}/latent_dim8.yaml", *FIT)
    never = fails("fit", "-c", f"{CONFIGS}/dim8.yaml", "--trainer.max_steps=3", "--model.compressor_steps=3", *NEW)
    assert "ends before the compressor is frozen" in never


def test_checkpoints_that_are_not_there_or_not_of_this_run(trained, fails):
    missing = fails("fit", "-c", f"{CONFIGS}/dim8.yaml", *NEW, "--ckpt_path=typo.ckpt")
    assert "There is no checkpoint typo.ckpt" in missing
    other = fails("fit", "-c", f"{CONFIGS}/dim8.yaml", "--ckpt_path=runs/latent_dim8")
    assert "runs/dim8 already holds a trained run" in other


@pytest.mark.parametrize("options", [["--data.num_frames=13"], ["--model.encoder_options={cels: 3}"]])
def test_options_that_do_not_fit(workspace, fails, options):
    assert "Traceback" not in fails("fit", "-c", f"{CONFIGS}/dim8.yaml", *options)


@pytest.mark.parametrize("workers", [0, 1])
def test_clips_that_are_all_too_short(workspace, fails, workers):
    said = fails(
        "fit",
        "-c",
        f"{CONFIGS}/dim8.yaml",
        "--data.num_frames=97",
        "--data.encoded=null",
        f"--data.num_workers={workers}",
    )
    assert "No sample of" in said and "shorter than 97 frames" in said and "Traceback" not in said


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
