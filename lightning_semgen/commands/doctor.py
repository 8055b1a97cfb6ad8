"""`lightning doctor`: what an encoder sees in a video, as a picture."""

import sys
from pathlib import Path
from typing import Any

import av
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.clip import Clip
from data.codec.decode import decode_clip
from data.rejected import Rejected
from encoders import build_encoder
from encoders.base import FrozenEncoder
from encoders.published.checkpoint import MissingWeights
from lightning_semgen.errors import UserError
from lightning_semgen.video.pictures import contact_sheet
from lightning_semgen.video.principal_components import pca_colours

FPS, SEMANTIC_FPS, SECONDS, SIDE = 24.0, 1.6, 5.0, 480  # of the clip: its first seconds, its shorter side at most


def doctor(
    *, encoder: str, video: Path, output: Path = Path("features.png"), encoder_options: dict[str, Any] | None = None
) -> None:
    """Shows what an encoder sees in a video: the first three principal components of its features, as colours.

    Args:
        encoder: a row of `encoders.ENCODERS`.
        video: any video file; its first 5 s are used.
        output: the picture.
        encoder_options: the encoder's own options.
    """
    network, weights = encoder_and_weights(encoder, encoder_options or {})
    frames, times = first_seconds(video, network)
    picture(network, frames, times, f"{encoder}, {weights}").save(output)
    print(f"{output}: frames, and the first three principal components of their features")


def encoder_and_weights(name: str, options: dict) -> tuple[FrozenEncoder, str]:
    """The encoder, and which weights it has: random ones if its own are missing here."""
    try:
        encoder = build_encoder(name, **options)
        weights = options.get("weights") or "its own weights"
    except MissingWeights as missing:
        print(f"{missing}\nRandom weights are shown instead.", file=sys.stderr)
        encoder, weights = build_encoder(name, **options | {"weights": "random"}), "random weights"
    if encoder is None:
        raise UserError(f"There are no features to picture with the encoder {name}.")
    return encoder, weights


def first_seconds(video: Path, encoder: FrozenEncoder) -> tuple[Tensor, Tensor]:
    """The frames uint8 (1, T, 3, H, W) at the beginning of a video that the encoder sees, and their times (T,)."""
    try:
        with av.open(video) as container:
            stream = container.streams.video[0]
            height, width, length = stream.height, stream.width, (container.duration or 0) / av.time_base
        scale = min(1, SIDE / min(height, width))
        frames = int(min(SECONDS, length - 1 / FPS) * FPS) // 4 * 4 + 1  # as a VAE wants it
        clip = Clip(frames, round(height * scale / 16) * 16, round(width * scale / 16) * 16, FPS, SEMANTIC_FPS)
        decoded = decode_clip(video.read_bytes(), clip, semantic_only=encoder.stream == "semantic")
    except (OSError, av.FFmpegError, IndexError, Rejected) as error:
        raise UserError(f"The video {video} cannot be used: {error}.") from error
    return decoded[None], clip.semantic_times if encoder.stream == "semantic" else clip.times


def picture(encoder: FrozenEncoder, frames: Tensor, times: Tensor, label: str) -> Image.Image:
    """The frames at the tokens' times above the colours of their features."""
    features = encoder(frames)[0]
    seconds = encoder.seconds(times)
    shown = frames[0, (times[None] - seconds[:, None]).abs().argmin(1)]
    colours = F.interpolate(pca_colours(features), shown.shape[-2:], mode="nearest")
    grid = " x ".join(map(str, features.shape[:3]))
    labels = [f"{seconds[0]:.2f} to {seconds[-1]:.2f} s", f"{label}: {grid} features of {features.shape[-1]} channels"]
    return contact_sheet(torch.stack([shown, colours]), labels, min(len(shown), 6), width=288, columns=1)
