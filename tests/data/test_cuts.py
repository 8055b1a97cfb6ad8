"""Clips cut from encoded stretches are the clips that lie there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CLIP, CONFIGS, save_text_encoder, stage

from data.clip import Clip
from data.codec.decode import decode_clip
from data.datamodule import VideoDataModule
from data.datasets import ClipDataset, Stream
from data.encoded.cuts import CutClips, Stretches
from data.encoded.encoding import StretchEncoding
from data.encoded.parts import Part
from data.encoded.precompute import precompute_shards
from data.rejected import Rejected
from data.selection import Selection
from data.shards.reader import Shards
from data.toy.shards import render_toy_world
from encoders.vae.base import FrozenVAE, build_vae
from encoders.vae.taef2 import TAEF2
from encoders.vae.wan import WanVAE
from lightning_semgen.errors import UserError
from lightning_semgen.runs import load_checkpoint
from lightning_semgen.stages.latent import LatentStage
from lightning_semgen.stages.semantic import SemanticStage

SECONDS = 12
FIVE = replace(CLIP, num_frames=121)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Three toy films of 12 s, one of 2 s, and two of 12 s to validate on."""
    folder = tmp_path_factory.mktemp("films")
    long = replace(CLIP, num_frames=24 * SECONDS + 1)
    render_toy_world(str(folder / "train-a*.tar"), "train", 3, long)
    render_toy_world(str(folder / "train-b*.tar"), "train", 1, CLIP)
    render_toy_world(str(folder / "heldout-*.tar"), "heldout", 2, long)
    return folder


@pytest.mark.parametrize(
    "fps, semantic_fps, apart", [(24, 1.6, 60), (24, 3.2, 60), (24, 2.5, 96), (4, 0.8, 20), (30, 1.6, 300)]
)
def test_starts_are_where_both_grids_begin_anew(fps, semantic_fps, apart):
    clip = Clip(121, 48, 48, float(fps), float(semantic_fps))
    assert clip.period == apart and clip.period % 4 == 0 and clip.semantic_period % 2 == 0
    whole = replace(clip, num_frames=121 + 3 * apart).semantic_indices
    for start in range(4):
        mine = whole[start * clip.semantic_period :][: len(clip.semantic_indices)]
        assert [index - start * apart for index in mine] == clip.semantic_indices


def test_a_part_is_cut_or_kept_for_each_start_whichever_is_smaller():
    assert Part.of(1, 31, 15, 4, 13) == Part(1, 31, 15, 4, 13)
    assert Part.of(1, 19, 15, 4, 13) == Part(1, 19, 15, 19)  # 2 s, and Wan's of 5 s
    assert Part.of(1, 31, 15, 29, 113) == Part(1, 31, 15, 31)
    whole = torch.arange(200).view(1, 200)
    for part in (
        Part(1, 31, 15, 4, 13),
        Part(1, 50, 15, 29, 113),
        Part(1, 4, 2, 0),
        Part(1, 16, 15, 0),
        Part(1, 31, 15, 31),
    ):
        pieces = {f"{n}.npy": piece for n, piece in enumerate(whole.split(part.stride, 1))}
        for start in range(4):
            own = whole[:, start * part.stride :][:, : part.own]
            tensors = [{**pieces, part.own_name(start): own}[name] for name in part.names(start)]
            assert torch.equal(part.cut(tensors), whole[:, start * part.stride :][:, : part.steps])


def small_wan(**options) -> WanVAE:
    return WanVAE(base_dim=4, z_dim=2, latents_mean=[0.0] * 2, latents_std=[1.0] * 2, **options)


VAES = {
    "toy": (lambda: build_vae("toy").model, 48, 3),
    "wan 2.1": (small_wan, 8, 28),
    "wan 2.2": (lambda: small_wan(is_residual=True, in_channels=12, out_channels=12, patch_size=2), 16, 28),
}


@pytest.mark.parametrize("name", VAES)
def test_reach_is_how_far_back_a_latent_looks_and_beyond_it_all_are_the_same(name):
    torch.manual_seed(0)
    make, side, reach = VAES[name]
    vae = FrozenVAE(make().double()).double().freeze()
    assert vae.reach == reach
    frames = torch.randint(256, (1, 8 + 4 * (reach + 2) + 1, 3, side, side), dtype=torch.uint8)
    whole, alone = vae.encode(frames), vae.encode(frames[:, 8:])
    off = (whole[:, :, 2:] - alone).abs().amax((0, 1, 3, 4))
    assert (off[:reach] > 1e-13).all() and (off[reach + 1 :] < 1e-13).all()
    one = frames.clone()
    one[:, 9:13] = 255 - one[:, 9:13]  # group 1 of the clip
    off = (vae.encode(one[:, 8:]) - alone).abs().amax((0, 1, 3, 4))
    assert off[1 + reach] > 0 and off[2 + reach] == 0


def test_reach_of_the_published_vaes():
    assert WanVAE.load("random").reach == 28 and TAEF2.reach == 0


STAGES = {
    "features": (SemanticStage, {}),
    "pooled": (SemanticStage, {"encoder": "vae"}),
    "latents": (LatentStage, {}),
    "baseline": (LatentStage, {"encoder": "none"}),
}


def encoded(made, films, folder, seconds: float = float("inf")) -> CutClips:
    """The training films as a stage encodes them."""
    clips = ClipDataset(Shards(str(films / "train-*.tar")), made.clip, made.needs_video)
    how = StretchEncoding(folder, {}, made.frozen.precompute, made.clip, made.frozen.cut_parts, batch_size=3)
    precompute_shards(Stretches(clips, seconds), [how], batch_size=1, workers=0)
    return CutClips(Shards(str(folder / "*.tar")), made.clip, Selection(), made.frozen.cut_parts)


def by_start(cut: CutClips, index: int) -> dict[float, dict]:
    """Samples with other keys until each start has been drawn."""
    found = {}
    for key in range(50):
        sample = cut.sample(index, key)
        starts = sample["info"]["starts"]
        found[starts[cut.selection.drawn(len(starts), key)]] = sample
    assert list(sorted(found)) == starts
    return found


@pytest.mark.parametrize("clip", [CLIP, FIVE], ids=["2s", "5s"])
@pytest.mark.parametrize("name", STAGES)
def test_a_cut_clip_is_the_clip_that_lies_there(name, clip, films, tmp_path):
    cls, options = STAGES[name]
    made = stage(cls, clip=clip, **options)
    cut, videos = encoded(made, films, tmp_path), Shards(str(films / "train-*.tar"))
    assert len(cut) == (4 if clip is CLIP else 3)  # the short film is as long as one clip
    for index in range(len(cut)):
        samples = by_start(cut, index)
        assert len(samples) == (1 if index == 3 else 5 if clip is CLIP else 3)
        for start, sample in samples.items():
            frames = decode_clip(videos.read(index)["mp4"], clip, start)
            alone = made.frozen.precompute(
                {"frames": frames[None], "semantic_frames": frames[clip.semantic_indices][None]}
            )
            for part, (tensor,) in alone.items():
                torch.testing.assert_close(sample[part], tensor, rtol=1e-3, atol=1e-3)


def test_captions_are_encoded_once_and_a_missing_part_is_rejected(films, tmp_path):
    save_text_encoder(tmp_path / "text", dim=16)
    made = stage(SemanticStage, text_encoder=str(tmp_path / "text"))
    cut = encoded(made, films, tmp_path / "made")
    for key in range(4):
        sample = cut.sample(0, key)
        torch.testing.assert_close(sample["text"], made.frozen.text.embed([sample["caption"]])[0], rtol=1e-3, atol=1e-3)
    del cut.shards.samples[0][2]["features.start2.npy"]
    with pytest.raises(Rejected, match="no features at one of its starts"):
        cut.sample(0)  # which is the middle one


def test_what_is_kept_once_and_what_for_each_start(films, tmp_path):
    made = stage(LatentStage, clip=FIVE)
    assert made.frozen.cut_parts == {"features": Part(0, 4, 2, 0), "latents": Part(1, 31, 15, 4, 13)}
    cut = encoded(made, films, tmp_path)
    names = sorted(cut.shards.samples[0][2])
    own = [f"latents.start{n}.npy" for n in range(3)]
    assert names == ["features.0.npy", "features.1.npy", "features.2.npy", "features.3.npy", "json"] + sorted(
        [*own, *(f"latents.{n}.npy" for n in range(5))]
    )
    assert stage(LatentStage).frozen.cut_parts == {"features": Part(0, 2, 2, 2), "latents": Part(1, 13, 15, 13)}


def test_latents_from_the_middle_differ_where_they_depend_on_the_past(films):
    """What own latents are for: the figures of docs/data.md."""
    vae, errors, std = build_vae("toy"), [], []
    long = replace(CLIP, num_frames=24 * SECONDS + 1)
    for index in range(3):
        frames = decode_clip(Shards(str(films / "train-a*.tar")).read(index)["mp4"], long)[None]
        whole = vae.encode(frames)
        std.append(whole)
        for start in range(60, 24 * SECONDS - 48, 60):
            errors.append(whole[:, :, start // 4 :][:, :, :13] - vae.encode(frames[:, start : start + 49]))
    off = torch.cat(errors).square().mean((0, 1, 3, 4)).sqrt() / torch.cat(std).std()
    print("rms of latents 0, 1, 2, …, by their std: " + ", ".join(f"{value:.1e}" for value in off))
    assert off[0] > 0.03 and off[1] > 1e-3 and (off[vae.reach + 1 :] < 1e-5).all()


@pytest.mark.parametrize("seconds, starts", [(8, 3), (4.5, 2), (100, 5)])
def test_stretches_are_of_at_most_the_seconds_asked_for_and_in_the_middle(films, tmp_path, seconds, starts):
    info = encoded(stage(SemanticStage), films, tmp_path, seconds).sample(0)["info"]
    assert len(info["starts"]) == starts
    first, last = info["starts"][0], SECONDS - (info["starts"][-1] + CLIP.duration)
    assert abs(first - last) < 0.1 and info["starts"][-1] + CLIP.duration - first <= seconds


def test_starts_are_drawn_anew_each_epoch_and_the_same_after_resume(films, tmp_path):
    cut = encoded(stage(SemanticStage), films, tmp_path)
    stream = Stream(cut, seed=0, open_shards=1)
    positions = [position for position in range(6 * len(cut)) if stream.order(position) == 0]
    drawn = [stream[position]["features"] for position in positions]
    assert len(drawn) == 6 and len({tuple(features.flatten()[:8].tolist()) for features in drawn}) > 2
    for position, features in zip(positions, drawn, strict=True):
        assert torch.equal(Stream(cut, seed=0, open_shards=1)[position]["features"], features)
    cut.selection = Selection("centre")
    middle = cut.sample(0)["features"]
    assert all(torch.equal(cut.sample(0, key)["features"], middle) for key in range(9))


STRETCHES = "--data.encoded_seconds=.inf"
DIRECT = ("--data.encoded=null", "--data.train_shards=made/train/*.tar", "--data.val_shards=made/val/*.tar")


def on(films) -> list[str]:
    return [
        "-c", f"{CONFIGS}/paper_recipe/paper_latent_dim8.yaml", f"--data.train_shards={films}/train-*.tar",
        f"--data.val_shards={films}/heldout-*.tar", "--data.encoded=made", "--model.compressor_steps=1",
        "--trainer.max_steps=6", "--trainer.accelerator=cpu",
    ]  # fmt: skip


def test_a_fit_encodes_stretches_and_configs_that_do_not_fit_are_told(films, tmp_path, monkeypatch, lightning, fails):
    monkeypatch.chdir(tmp_path)
    lightning("fit", *on(films), STRETCHES, "--trainer.max_steps=3")
    assert (
        len(list(tmp_path.glob("made/*/*.tar"))) == 3 and load_checkpoint("runs/paper_latent_dim8")["global_step"] == 3
    )
    new = ("fit", *on(films), "--trainer.default_root_dir=new")
    said = fails(*new)
    assert "made/train were made with encoded_seconds inf, the config says None: delete that folder" in said
    assert "made with encoded_seconds inf, the config says 8.0" in fails(*new, "--data.encoded_seconds=8")
    assert "made with encoded_seconds inf, the config says None" in fails(*new, *DIRECT)


@pytest.mark.slow
def test_a_fit_on_cut_clips_goes_on_exactly(films, tmp_path, monkeypatch, lightning):
    monkeypatch.chdir(tmp_path)
    lightning("encode", *on(films), STRETCHES)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("made/*/*.tar")}
    fit = ("fit", *on(films), STRETCHES)
    lightning(*fit, "--trainer.default_root_dir=unbroken")
    broken = "--trainer.default_root_dir=broken"
    lightning(*fit, broken, "--trainer.limit_train_batches=3", "--trainer.max_epochs=1")
    assert load_checkpoint("broken")["global_step"] == 3
    lightning(*fit, broken, "--ckpt_path=last")
    # Encoded shards are shards: a config may name them itself.
    lightning(*fit, *DIRECT, "--trainer.default_root_dir=direct")
    one, two, three = (load_checkpoint(run) for run in ("unbroken", "broken", "direct"))
    assert one["VideoDataModule"] == two["VideoDataModule"] == {"delivered": 24}
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]) and torch.equal(value, three["state_dict"][name])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("made/*/*.tar")} == written


def test_shards_of_single_clips_are_no_stretches(films, tmp_path, monkeypatch, lightning, fails):
    monkeypatch.chdir(tmp_path)
    lightning("encode", *on(films))
    found = json.loads(Path("made/train/fingerprint.json").read_text())
    assert found.pop("encoded_seconds") is None
    Path("made/train/fingerprint.json").write_text(json.dumps(found))  # as they were written before there was a choice
    lightning("fit", *on(films), "--trainer.max_steps=2")
    said = fails("fit", *on(films), STRETCHES, "--trainer.default_root_dir=new")
    assert "made with encoded_seconds None, the config says inf" in said


def test_seconds_that_leave_no_choice():
    with pytest.raises(UserError, match="encoded_seconds is 4, .* one clip of 2 s alone: .* every 2.5 s. Give 4.5 or"):
        VideoDataModule(encoded_seconds=4)
    VideoDataModule(encoded_seconds=4.5)
