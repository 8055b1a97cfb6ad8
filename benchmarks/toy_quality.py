"""Quality of the embedded encoder and VAE on held-out clips of the toy world.   python benchmarks/toy_quality.py"""

import time
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.clip import Clip
from data.codec.decode import decode_clip
from data.toy.checker import read_video
from data.toy.world import toy_clip
from encoders import build_encoder
from encoders.vae.base import build_vae
from lightning_semgen.stages.toy_parts import attribute_labels

CLIP = Clip(num_frames=49, height=48, width=48, fps=24.0, semantic_fps=1.6)
TRAIN, HELDOUT = 1600, 192


def clips(split: str, count: int, semantic_only: bool) -> tuple[Tensor, list[dict]]:
    rows = [toy_clip(split, index, seed=2) for index in range(count)]
    frames = torch.stack([decode_clip(video, CLIP, semantic_only=semantic_only) for _, video, _ in rows])
    return frames, [info for *_, info in rows]


def sprite_centres(frames: Tensor) -> Tensor:
    """(B, T, 2): x, y of the saturated pixels' centre in frames (B, T, 3, H, W) in [0, 1]; the frame is -1 to 1."""
    height, width = frames.shape[-2:]
    weight = (frames.amax(2) - frames.amin(2) - 0.2).relu() + 1e-6
    x, y = (torch.linspace(1 / n - 1, 1 - 1 / n, n, device=frames.device) for n in (width, height))
    sums = torch.stack([(weight.sum(2) * x).sum(2), (weight.sum(3) * y).sum(2)], dim=2)
    return sums / weight.sum((2, 3))[..., None]


def psnr(shown: Tensor, true: Tensor) -> float:
    """Mean over clips, in dB."""
    error = (shown.float() - true.float()).square().flatten(1).mean(1)
    return (10 * torch.log10(255**2 / error)).mean().item()


def milliseconds(function, clips: Tensor) -> float:
    """Median of five runs on eight single clips, per clip."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for clip in clips[:8]:
            function(clip[None])
        times.append((time.perf_counter() - start) / 8 * 1e3)
    return median(times)


def vae_table() -> None:
    vae, (frames, infos) = build_vae("toy"), clips("heldout", HELDOUT, semantic_only=False)
    latents = torch.cat([vae.encode(part) for part in frames.split(32)])
    decode = lambda z: torch.cat([vae.decode(part) for part in z.split(32)])  # noqa: E731
    shown = decode(latents)
    noisy = decode(latents + 0.1 * torch.randn_like(latents))
    print(f"VAE PSNR                          {psnr(shown, frames):.2f} dB")
    print(f"VAE PSNR, latents + 0.1 noise     {psnr(noisy, frames):.2f} dB")
    for name in ("colour", "shape", "direction"):
        right = [getattr(read_video(clip), name) == info[name] for clip, info in zip(shown, infos, strict=True)]
        print(f"checker on reconstructions, {name:9} {sum(right) / len(right):.3f}")
    print(f"VAE encode, one clip, one thread  {milliseconds(vae.encode, frames):.1f} ms")
    print(f"VAE decode, one clip, one thread  {milliseconds(vae.decode, list(latents)):.1f} ms")


def standardised(known: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = known.mean(0), known.std(0) + 1e-6
    return (known - mean) / std, (seen - mean) / std


def linear_probe(known: Tensor, labels: Tensor, seen: Tensor) -> Tensor:
    """Logistic regression, lightly regularised: classes of `seen`."""
    known, seen = standardised(known, seen)
    layer = nn.Linear(known.shape[1], int(labels.max()) + 1)
    optimiser = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(layer(known), labels) + 1e-3 * layer.weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return layer(seen).argmax(1)


def centre_r2(known: Tensor, centres: Tensor, seen: Tensor, truth: Tensor) -> float:
    """R² of a ridge regression of the sprite's centre in the frames of the semantic stream."""
    known, seen = (F.pad(x, (0, 1), value=1.0) for x in standardised(known, seen))
    ridge = 1e-3 * len(known) * torch.eye(known.shape[1])
    guess = seen @ torch.linalg.solve(known.T @ known + ridge, known.T @ centres)
    return (1 - (guess - truth).square().sum() / (truth - truth.mean(0)).square().sum()).item()


def encoder_table() -> None:
    encoder, known, seen = (
        build_encoder("toy"),
        *(clips(s, n, True) for s, n in (("train", TRAIN), ("heldout", HELDOUT))),
    )
    features = [torch.cat([encoder(part) for part in frames.split(64)]) for frames, _ in (known, seen)]
    labels = [attribute_labels(infos, torch.device("cpu")) for _, infos in (known, seen)]
    for title, view in (("mean token", lambda f: f.mean((1, 2, 3))), ("all tokens", lambda f: f.flatten(1))):
        a, b = map(view, features)
        for name in ("colour", "shape", "direction", "size"):
            right = (linear_probe(a, labels[0][name], b) == labels[1][name]).float().mean()
            print(f"encoder, linear probe, {title}, {name:9} {right:.3f}")
    centres = [sprite_centres(frames / 255).flatten(1) for frames, _ in (known, seen)]
    print(f"encoder, centre of the sprite, R²  {centre_r2(a, centres[0], b, centres[1]):.3f}")
    print(f"encoder, one clip, one thread      {milliseconds(encoder, seen[0]):.1f} ms")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    vae_table()
    encoder_table()
