"""Videos from references, and from Python: the same as the command's, every time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch
from conftest import CLIP, CONFIGS, SMALL
from PIL import Image
from safetensors import safe_open

from data.codec.decode import decode_clip
from data.codec.mp4 import write_mp4
from data.datasets import References
from data.toy.world import toy_clip
from lightning_semgen import Generator
from lightning_semgen.errors import UserError
from lightning_semgen.runs import last_checkpoint, load_checkpoint
from lightning_semgen.trainer_cli import run

PREDICT = ("predict", "-c", "runs/latent_dim8/config.yaml")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder with a.mp4, which has a caption, and b.mp4, which has none."""
    folder = tmp_path_factory.mktemp("references")
    for index, name in enumerate("ab"):
        (folder / f"{name}.mp4").write_bytes(toy_clip("heldout", index, 0)[1])
    (folder / "a.txt").write_text("a red circle\n")
    return folder


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """runs/dim8 and runs/latent_dim8, whose networks are random rather than still silent."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("shards").symlink_to(shards / "shards")
        for name in ("dim8", "latent_dim8"):
            run(["fit", "-c", f"{CONFIGS}/{name}.yaml", "--trainer.max_steps=1", "--model.compressor_steps=0", *SMALL])
            checkpoint = load_checkpoint(f"runs/{name}")
            checkpoint["state_dict"]["ema.transformer.proj_out.weight"].normal_(std=0.1)
            torch.save(checkpoint, last_checkpoint(f"runs/{name}"))
    return folder / "runs"


def test_the_other_stage_brings_nothing_twice(trained):
    stage = Generator.from_runs("runs/latent_dim8", device="cpu").stage
    assert stage.partner.space.encoder is stage.space.encoder
    assert stage.generator is None and stage.partner.generator is None


@pytest.fixture
def trained(runs, tmp_path, monkeypatch):
    """The current folder, with a copy of these runs."""
    shutil.copytree(runs, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(*arguments) -> list[tuple[str, str, int]]:
    return [(row["reference"], row["caption"], row["seed"]) for row in References(*arguments)]


def test_every_reference_has_its_caption_or_every_prompt(videos):
    assert rows(videos, CLIP, None, 3) == [("a", "a red circle", 3), ("b", "", 3)]
    assert rows(videos / "b.mp4", CLIP, None, 3, 2) == [("b", "", 3), ("b", "", 4)]
    prompts = [{"caption": "one"}, {"caption": "two"}]
    assert rows(videos, CLIP, prompts, 0) == [("a", "one", 0), ("a", "two", 0), ("b", "one", 0), ("b", "two", 0)]


def test_variants_follow_their_reference(trained, videos, lightning):
    predict = (*PREDICT, "--data.samples_per_prompt=2", "--seed_everything=5")
    shutil.rmtree("runs/dim8")  # the other run is not needed
    lightning(*predict, f"--data.reference={videos}")
    folder = trained / "runs/latent_dim8/predict"
    names = ["0000-a-seed5.mp4", "0001-a-seed6.mp4", "0002-b-seed5.mp4", "0003-b-seed6.mp4"]
    assert sorted(path.name for path in folder.glob("*.mp4")) == names
    written = [(folder / name).read_bytes() for name in names]
    assert len({decode_clip(video, CLIP).numpy().tobytes() for video in written}) == 4
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.size == (3 * (6 * 72 + 12), 2 * (72 + 3 * 12 + 12))
    lightning(*predict, f"--data.reference={videos}/b.mp4")
    # The same reference, prompt and seed give the same video, whatever it is made beside.
    again = decode_clip((folder / "0000-b-seed5.mp4").read_bytes(), CLIP).float()
    assert (again - decode_clip(written[2], CLIP).float()).abs().mean() < 0.1


def test_the_semantic_stage_writes_the_semantics_of_a_reference(trained, videos, lightning):
    lightning("predict", "-c", "runs/dim8/config.yaml", f"--data.reference={videos}/a.mp4")
    (file,) = (trained / "runs/dim8/predict").glob("*.safetensors")
    with safe_open(file, "pt") as semantics:
        assert file.name == "0000-a-seed0.safetensors" and semantics.get_tensor("semantics").shape == (2, 3, 3, 8)


def test_references_that_cannot_be_used(trained, videos, fails, tmp_path):
    def said(reference) -> str:
        return fails(*PREDICT, f"--data.reference={reference}", "--data.num_workers=1")

    assert "There is no nowhere.mp4" in said("nowhere.mp4")
    (tmp_path / "empty").mkdir()
    assert "There are no videos in" in said(tmp_path / "empty")
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 9)
    assert "noise.mp4 cannot be used: does not decode" in said(tmp_path / "noise.mp4")
    write_mp4(torch.zeros(9, 3, 48, 48, dtype=torch.uint8), tmp_path / "short.mp4")
    message = said(tmp_path / "short.mp4")
    assert "short.mp4 cannot be used: shorter than 49 frames at 24 fps" in message and "Traceback" not in message


def test_a_run_without_semantics_follows_no_reference(workspace, lightning, fails, videos):
    options = ("--model.encoder=none", "--data.encoded=null", "--trainer.max_steps=1")
    lightning("fit", "-c", f"{CONFIGS}/latent_dim8.yaml", *options)
    assert "encoder none" in fails(*PREDICT, f"--data.reference={videos}/a.mp4")


def test_python_gives_the_commands_videos(trained, videos, lightning):
    generate = Generator.from_runs(semantic="runs/dim8", latent="runs/latent_dim8", device="cpu")
    (trained / "prompts.txt").write_text("a red circle moves left\n")
    prompts = ("--data.prompts=prompts.txt", "--seed_everything=1")
    ways = [(None, "--model.semantic_run=runs/dim8"), (videos / "b.mp4", f"--data.reference={videos}/b.mp4")]
    for reference, option in ways:
        lightning(*PREDICT, *prompts, option)
        video = generate("a red circle moves left", seed=1, reference=reference)
        video.save(trained / "python/x.mp4")
        (written,) = (trained / "runs/latent_dim8/predict").glob("*.mp4")
        assert written.read_bytes() == (trained / "python/x.mp4").read_bytes()
        written.unlink()
    with av.open(trained / "python/x.mp4") as file:
        assert file.metadata["title"] == "a red circle moves left" and file.metadata["comment"] == "seed=1"
    assert video.frames.shape == (49, 3, 48, 48) and video.frames.dtype == torch.uint8


def test_many_prompts_and_references_are_a_list(trained, videos):
    generate = Generator.from_runs("runs/latent_dim8")
    both = generate(["one", "two"], reference=videos / "a.mp4")
    assert [video.prompt for video in both] == ["one", "two"] and len(generate(reference=videos)) == 2
    assert torch.equal(both[1].frames, generate("two", reference=videos / "a.mp4").frames)
    with pytest.raises(UserError, match="name a LatentStage"):
        Generator.from_runs("runs/dim8")


def test_the_package_alone_imports_no_torch():
    code = "import sys, lightning_semgen; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(CONFIGS.parent)})
