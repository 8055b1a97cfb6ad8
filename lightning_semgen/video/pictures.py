"""Videos as something to look at: animated tables for TensorBoard, contact sheets, file names."""

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

MARGIN, LINE = 6, 12  # pixels: around a picture, a line of text
SIDE, PROMPT = 96, 126  # pixels: width of an animated video, of the prompts beside it
PLAYED = 12  # frames per second of an animation: players do not keep up with 24
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


def animated_table(columns: dict[str, Tensor], prompts: Sequence[str], seconds: float) -> bytes:
    """A GIF that lasts `seconds`, with a row for each prompt and in it the clip's video of each column.

    Columns are uint8 (B, T, 3, H, W) and differ in all but B: what has fewer frames holds them longer, and all are
    scaled to the shape of the first column's.
    """
    videos = [_channels_last(column) for column in columns.values()]
    height, width = videos[0].shape[2:4]
    tile = (SIDE, round(SIDE * height / width))
    page = _table(list(columns), prompts, tile)
    steps = min(round(seconds * PLAYED), max(video.shape[1] for video in videos))
    pages = [
        _filled(page, [video[:, step * video.shape[1] // steps] for video in videos], tile) for step in range(steps)
    ]
    buffer = io.BytesIO()
    pages[0].save(buffer, "GIF", save_all=True, append_images=pages[1:], duration=round(1000 * seconds / steps), loop=0)
    return buffer.getvalue()


def _table(titles: list[str], prompts: Sequence[str], tile: tuple[int, int]) -> Image.Image:
    """A page with titles above and prompts beside the empty tiles."""
    page = Image.new("RGB", (_corner(0, len(titles), tile)[0], _corner(len(prompts), 0, tile)[1]), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for number, title in enumerate(titles):
        draw.text((_corner(0, number, tile)[0], 2), textwrap.fill(title, tile[0] // 6), "black", font)
    for number, prompt in enumerate(prompts):
        lines = textwrap.wrap(prompt, PROMPT // 7)[: tile[1] // 15]
        draw.text((MARGIN, _corner(number, 0, tile)[1]), "\n".join(lines), "black", font)
    return page


def _corner(row: int, column: int, tile: tuple[int, int]) -> tuple[int, int]:
    return PROMPT + 2 * MARGIN + column * (tile[0] + MARGIN), 3 * LINE + row * (tile[1] + MARGIN)


def _filled(page: Image.Image, columns: list[np.ndarray], tile: tuple[int, int]) -> Image.Image:
    """The page with frames (B, H, W, 3) in its tiles."""
    page = page.copy()
    for number, frames in enumerate(columns):
        for row, frame in enumerate(frames):
            page.paste(Image.fromarray(frame).resize(tile, Image.Resampling.NEAREST), _corner(row, number, tile))
    return page


def evenly(videos: Tensor, frames: int = STRIP) -> Tensor:
    """That many frames of videos (…, T, 3, H, W), the first and the last among them."""
    return videos[..., evenly_spaced(videos.shape[-4], frames), :, :, :].cpu()


def evenly_spaced(length: int, count: int) -> Tensor:
    """`count` evenly spaced indices of a sequence, with the first and the last."""
    return torch.linspace(0, length - 1, count).round().long()


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
