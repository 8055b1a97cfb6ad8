"""What a validation leaves in TensorBoard, read back from the event files of real fits."""

import io
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import CLIP, CONFIGS, SMALL
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from data.batch import collate
from data.datasets import ClipDataset, FixedClips
from data.shards.reader import Shards
from lightning_semgen.callbacks.board import CURVES
from lightning_semgen.callbacks.gallery import pictures
from lightning_semgen.cli import main
from lightning_semgen.runs import load_stage
from lightning_semgen.stages.latent import LatentStage
from lightning_semgen.video.generated import previews

FIT = ("--trainer.max_steps=2", "--model.compressor_steps=1", "--trainer.log_every_n_steps=1")


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """runs/dim8, runs/latent_dim8 and, with the latter as its partner, runs/again; two steps each."""
    again = (
        "--trainer.default_root_dir=runs/again",
        "--model.compressor=runs/dim8",
        "--model.latent_run=runs/latent_dim8",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_semgen.stages.semantic_space.MEASURED_CLIPS", 16)
        patch.chdir(tmp_path_factory.mktemp("gallery"))
        Path("shards").symlink_to(shards / "shards")
        for name, encoded, options in (("dim8", "features", ()), ("latent_dim8", "latents", ()), ("dim8", None, again)):
            where = f"--data.encoded={encoded or 'null'}"
            patch.setattr(
                sys, "argv", ["lightning", "fit", "-c", f"{CONFIGS}/{name}.yaml", *SMALL, *FIT, where, *options]
            )
            main()
        yield Path("runs").absolute()


@pytest.fixture
def batch(shards):
    clips = FixedClips(ClipDataset(Shards(str(shards / "shards/toy/heldout-*.tar")), CLIP))
    return collate([clips[index] for index in range(4)])


def events(run) -> EventAccumulator:
    return EventAccumulator(str(run)).Reload()


def hyperparameters(run) -> tuple[dict, list[str]]:
    found = {
        tag: HParamsPluginData.FromString(events(run).SummaryMetadata(f"_hparams_/{tag}").plugin_data.content)
        for tag in ("session_start_info", "experiment", "session_end_info")
    }
    values = found["session_start_info"].session_start_info.hparams
    metrics = [metric.name.tag for metric in found["experiment"].experiment.metric_infos]
    assert found["session_end_info"].session_end_info.status == 1  # success
    return {name: value.string_value or value.number_value for name, value in values.items()}, metrics


def test_what_each_run_shows(trained, batch):
    dim8, latent, again = (events(trained / run) for run in ("dim8", "latent_dim8", "again"))
    assert dim8.Tags()["images"] == ["gallery/semantics"]  # there was no latent generator yet
    assert set(latent.Tags()["images"]) == set(again.Tags()["images"]) == {"gallery/videos", "gallery/semantics"}
    (event,) = latent.Images("gallery/videos")
    image = Image.open(io.BytesIO(event.encoded_image_string))
    assert event.step == 2 and image.format == "GIF" and image.n_frames == 24

    adherence = {f"adherence/{name}" for name in ("colour", "shape", "direction")}
    assert adherence <= set(latent.Tags()["scalars"]) & set(again.Tags()["scalars"])
    assert all(0 <= latent.Scalars(tag)[-1].value <= 1 for tag in adherence)
    assert not any(tag.startswith(("epoch", "hp_metric")) for tag in dim8.Tags()["scalars"])

    channels = {f"z_sem/{name} of each channel" for name in ("mean", "std", "KL")}
    assert set(dim8.Tags()["histograms"]) == channels and not latent.Tags()["histograms"]
    std = load_stage(trained / "dim8").space(batch).flatten(0, -2).std(0, correction=0)
    assert dim8.Scalars("z_sem/smallest std")[-1].value == pytest.approx(std.min().item(), rel=1e-2)
    assert dim8.Scalars("z_sem/largest std")[-1].value == pytest.approx(std.max().item(), rel=1e-2)
    assert dim8.Histograms("z_sem/std of each channel")[-1].histogram_value.num == 8

    facts, metrics = hyperparameters(trained / "latent_dim8")
    assert facts["stage"] == "LatentStage" and facts["encoder"] == facts["size"] == "toy"
    assert (facts["semantic_dim"], facts["batch_size"], facts["steps"]) == (8, 4, 2)
    assert metrics == list(CURVES) == hyperparameters(trained / "dim8")[1]
    assert set(metrics) <= set(latent.Tags()["scalars"])
    assert not list(trained.rglob("hparams.yaml")) and all(path.is_dir() for path in trained.iterdir())


def test_the_same_clips_through_every_part(trained, batch):
    latent = load_stage(trained / "latent_dim8")
    shown = pictures(latent, latent.partner, batch)
    assert list(shown["videos"]) == ["video", "VAE reconstruction", "on real semantics", "on generated semantics"]
    assert list(shown["semantics"])[2:] == ["features", "real semantics", "generated semantics"]
    assert torch.equal(shown["videos"]["video"], batch["frames"])
    whole = latent.vae.decode(latent.vae.encode(batch["frames"]))  # not one by one: kernels round otherwise
    assert (shown["videos"]["VAE reconstruction"].int() - whole.int()).abs().max() <= 1
    assert torch.equal(
        shown["videos"]["on generated semantics"], previews(latent.videos(batch["caption"], batch["key"]))
    )
    real = previews(latent.render(batch["caption"], batch["key"], latent.space(batch)))
    assert torch.equal(shown["videos"]["on real semantics"], real)
    assert shown["semantics"]["real semantics"].shape == (4, 2, 3, 3, 3)

    del batch["frames"], batch["semantic_frames"]  # as encoded shards have it
    batch["features"] = torch.randn(4, 2, 3, 3, latent.space.encoder.dim)
    batch["latents"] = torch.randn(4, *latent.latent_shape)
    assert list(pictures(latent, latent.partner, batch)["videos"])[0] == "VAE reconstruction"
    assert list(pictures(load_stage(trained / "dim8"), None, batch)["semantics"])[0] == "features"


def test_the_baseline_shows_what_it_makes_of_prompts(batch):
    shown = pictures(LatentStage(clip=CLIP, encoder="none", sampling_steps=1), None, batch)
    assert {name: list(columns) for name, columns in shown.items()} == {
        "videos": ["video", "VAE reconstruction", "on the prompt alone"]
    }


@pytest.mark.parametrize("damage", ["truncated", "no config", "another kind"])
def test_a_partner_that_cannot_be_loaded_ends_no_fit(damage, trained, workspace, lightning):
    for run in ("dim8", "latent_dim8"):
        shutil.copytree(trained / run, f"runs/{run}")
    checkpoint = Path("runs/latent_dim8/checkpoints/last.ckpt")
    if damage == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:10_000])
    elif damage == "no config":
        Path("runs/latent_dim8/config.yaml").unlink()
    else:
        shutil.copy("runs/dim8/checkpoints/last.ckpt", checkpoint)
    again = (
        "--trainer.default_root_dir=runs/again",
        "--model.compressor=runs/dim8",
        "--model.latent_run=runs/latent_dim8",
    )
    with pytest.warns(UserWarning, match="The other stage's pictures are not shown"):
        lightning("fit", "-c", f"{CONFIGS}/dim8.yaml", *FIT, "--data.encoded=null", *again)
    assert events("runs/again").Tags()["images"] == ["gallery/semantics"]


def test_the_gallery_can_be_turned_off(workspace, lightning):
    lightning("fit", "-c", f"{CONFIGS}/dim8.yaml", *FIT, "--data.encoded=null", "--gallery.enabled=false")
    assert not events("runs/dim8").Tags()["images"] and "val/flow_loss" in events("runs/dim8").Tags()["scalars"]
