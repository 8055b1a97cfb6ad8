"""Videos as something to look at: animated grids for TensorBoard, contact sheets, file names."""

import io
import re
import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

MARGIN, LINE, SIDE = 6, 12, 144  # pixels: around a picture, a line of text, shorter side of a shown frame
STRIP = 6  # frames of a video in a contact sheet


def _labelled(frame: np.ndarray, width: int, label: str) -> Image.Image:
    """A frame (H, W, 3) scaled to `width`, its label wrapped beneath."""
    height = round(width * frame.shape[0] / frame.shape[1])
    lines = textwrap.wrap(label, max(width // 6, 8))[:3]
    tile = Image.new("RGB", (width + 2 * MARGIN, height + 3 * LINE + 2 * MARGIN), "white")
    tile.paste(Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST), (MARGIN, MARGIN))
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(10)
    for number, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + height + number * LINE), line, "black", font)
    return tile


def _grid(tiles: list[Image.Image], columns: int) -> Image.Image:
    width, height = tiles[0].size
    page = Image.new("RGB", (width * columns, height * -(-len(tiles) // columns)), "white")
    for number, tile in enumerate(tiles):
        page.paste(tile, (number % columns * width, number // columns * height))
    return page


def _channels_last(videos: Tensor) -> np.ndarray:
    return videos.cpu().movedim(2, -1).numpy()


def animated_grid(videos: Tensor, labels: Sequence[str], fps: float, columns: int = 4) -> bytes:
    """A GIF of videos uint8 (B, T, 3, H, W) side by side, each above its label.

    Every other frame is shown: GIF players do not keep up with 24 fps.
    """
    array = _channels_last(videos)[:, ::2]
    pages = [
        _grid([_labelled(frame, SIDE, label) for frame, label in zip(step, labels, strict=True)], columns)
        for step in array.swapaxes(0, 1)
    ]
    buffer = io.BytesIO()
    pages[0].save(buffer, "GIF", save_all=True, append_images=pages[1:], duration=round(2000 / fps), loop=0)
    return buffer.getvalue()


def evenly(videos: Tensor, frames: int = STRIP) -> Tensor:
    """That many frames of videos (…, T, 3, H, W), the first and the last among them."""
    return videos[..., torch.linspace(0, videos.shape[-4] - 1, frames).round().long(), :, :, :].cpu()


def contact_sheet(
    videos: Tensor, labels: Sequence[str], frames: int = STRIP, width: int = 72, columns: int = 2
) -> Image.Image:
    """One row for each video uint8 (B, T, 3, H, W): that many frames, `width` wide, above the label."""
    array = _channels_last(evenly(videos, frames))
    strips = np.concatenate(list(array.swapaxes(0, 1)), axis=2)  # (B, H, frames·W, 3)
    return _grid(
        [_labelled(strip, width * frames, label) for strip, label in zip(strips, labels, strict=True)], columns
    )


def add_animation(writer: SummaryWriter, tag: str, gif: bytes, step: int) -> None:
    """A GIF as an image summary; TensorBoard's own video summary needs a library that no longer exists for it."""
    width, height = Image.open(io.BytesIO(gif)).size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def file_name(number: int, words: str, seed: int) -> str:
    """`0003-a-red-circle-moves-left-seed7`, to which an extension is added."""
    words = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:60]
    return f"{number:04d}-{words}-seed{seed}"
