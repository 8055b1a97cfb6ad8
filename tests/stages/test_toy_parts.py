"""The embedded VAE and encoder: causality, shapes, and the quality of the shipped weights."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import VideoMAEModel

import encoders
from data.clip import Clip
from data.codec.decode import decode_clip
from data.toy.checker import read_video
from data.toy.world import toy_clip
from encoders import build_encoder
from encoders.vae.toy import ToyVideoVAE
from lightning_semgen.stages.toy_parts import ATTRIBUTES, attribute_labels, psnr, recolour

WEIGHTS = Path(encoders.__file__).parent / "weights"
CLIP = Clip(num_frames=49, height=48, width=48, fps=24.0, semantic_fps=1.6)


def clips(split: str, count: int, seed: int = 1) -> tuple[Tensor, list[dict]]:
    """Decoded uint8 frames (count, 49, 3, 48, 48) and what they show."""
    rows = [toy_clip(split, index, seed) for index in range(count)]
    return torch.stack([decode_clip(video, CLIP) for _, video, _ in rows]), [info for *_, info in rows]


@pytest.fixture(scope="module")
def vae() -> ToyVideoVAE:
    return ToyVideoVAE.from_pretrained(WEIGHTS / "toy_vae", torch_dtype=torch.float32).eval()


@torch.no_grad()
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 16, 16), (5, 32, 48), (25, 64, 16)])
def test_any_whole_clip_runs(vae, frames, height, width):
    video = torch.rand(2, 3, frames, height, width) * 2 - 1
    latents = vae.encode(video).latent_dist.mode()
    assert latents.shape == (2, vae.config.z_dim, 1 + (frames - 1) // 4, height // 8, width // 8)
    assert vae.decode(latents).sample.shape == video.shape


@torch.no_grad()
@pytest.mark.parametrize("step", [0, 1, 3])
def test_latents_and_frames_do_not_see_the_future(vae, step):
    video = torch.rand(1, 3, 17, 32, 32) * 2 - 1
    changed = video.clone()
    changed[:, :, 4 * step + 1 :] = 0
    latents, others = (vae.encode(x).latent_dist.mode() for x in (video, changed))
    torch.testing.assert_close(latents[:, :, : step + 1], others[:, :, : step + 1])
    assert not torch.allclose(latents[:, :, step + 1], others[:, :, step + 1])

    others = latents.clone()
    others[:, :, step + 1 :] = 0
    shown, other = (vae.decode(z).sample for z in (latents, others))
    torch.testing.assert_close(shown[:, :, : 4 * step + 1], other[:, :, : 4 * step + 1])
    assert not torch.allclose(shown[:, :, 4 * step + 1], other[:, :, 4 * step + 1])


@pytest.mark.slow
@torch.no_grad()
def test_shipped_vae_reconstructs_heldout_clips_also_from_noisy_latents(vae):
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    generator, plain, noisy = torch.Generator().manual_seed(0), [], []
    for seed in (1, 2, 3):  # a clip's PSNR has a deviation of 2 dB, so that few clips say little
        for video in (clips("heldout", 192, seed)[0].movedim(1, 2) / 127.5 - 1).split(32):
            latents = vae.encode(video).latent_dist.mode()
            noise = torch.randn(latents.shape, generator=generator)
            plain.append(psnr(vae.decode(latents).sample, video))
            noisy.append(psnr(vae.decode(latents + 0.1 * std * noise).sample, video))
    assert torch.cat(plain).mean() >= 30
    assert torch.cat(noisy).mean() >= 27


@pytest.fixture(scope="module")
def pooled() -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """For each split the mean token (count, width) of its clips, and their labels."""
    encoder, result = build_encoder("toy"), {}
    for split, count in (("train", 600), ("heldout", 96)):
        rows = [toy_clip(split, index, seed=1) for index in range(count)]
        frames = torch.stack([decode_clip(video, CLIP, semantic_only=True) for _, video, _ in rows])
        features = torch.cat([encoder(part) for part in frames.split(96)])
        result[split] = features.mean((1, 2, 3)), attribute_labels([info for *_, info in rows], features.device)
    return result


def linear_probe(known: Tensor, labels: Tensor, seen: Tensor) -> Tensor:
    """Classes of `seen` by ridge regression to one-hot labels on standardised features."""
    mean, std = known.mean(0), known.std(0)
    known, seen = (F.pad((x - mean) / std, (0, 1), value=1.0) for x in (known, seen))
    gram = known.T @ known + 1e-2 * len(known) * torch.eye(known.shape[1])
    return (seen @ torch.linalg.solve(gram, known.T @ F.one_hot(labels).float())).argmax(1)


@pytest.mark.parametrize("attribute", ["colour", "shape", "direction"])
def test_a_linear_probe_tells_the_attributes_of_heldout_clips(attribute, pooled):
    (known, known_labels), (seen, labels) = (pooled[split] for split in ("train", "heldout"))
    guesses = linear_probe(known, known_labels[attribute], seen)
    assert (guesses == labels[attribute]).float().mean() >= 0.9


@pytest.mark.parametrize(("model", "folder"), [(ToyVideoVAE, "toy_vae"), (VideoMAEModel, "toy_encoder")])
def test_shipped_weights_are_complete_and_load_strictly(model, folder):
    _, report = model.from_pretrained(WEIGHTS / folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_shipped_weights_are_small():
    assert sum(path.stat().st_size for path in WEIGHTS.glob("toy_*/*")) <= 4e6


def test_recoloured_clips_show_the_colour_that_their_label_names():
    frames, info = clips("train", 12)
    video, colours = frames[:, CLIP.semantic_indices] / 255, attribute_labels(info, frames.device)["colour"]
    turned, wanted = recolour(video, colours)
    shown = [read_video((clip * 255).byte()) for clip in turned]
    assert [reading.colour for reading in shown] == [ATTRIBUTES["colour"][label] for label in wanted]
    assert [reading.shape for reading in shown] == [row["shape"] for row in info]
