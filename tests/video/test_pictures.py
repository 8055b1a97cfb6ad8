"""TensorBoard shows moving pictures."""

import io

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_semgen.video.pictures import add_animation, animated_table, contact_sheet, file_name

VIDEOS = torch.randint(0, 255, (3, 9, 3, 16, 24), dtype=torch.uint8)
PROMPTS = ["a red circle moves left", "two", "a very long prompt " * 10]


def test_the_event_file_holds_a_gif_that_plays(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        add_animation(writer, "videos", animated_table({"video": VIDEOS}, PROMPTS, seconds=0.5), step=7)
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Images("videos")
    image = Image.open(io.BytesIO(event.encoded_image_string))
    assert event.step == 7 and image.format == "GIF" and image.n_frames == 6
    assert image.size == (event.width, event.height)
    assert image.info["duration"] == pytest.approx(1000 / 12, abs=10) and image.info["loop"] == 0


def test_columns_of_a_table_play_in_step():
    black, white = torch.zeros(1, 1, 3, 4, 4, dtype=torch.uint8), torch.full((1, 1, 3, 4, 4), 255, dtype=torch.uint8)
    slow, fast = torch.cat([black, white], 1), torch.cat([black, black, black, white], 1)
    image = Image.open(io.BytesIO(animated_table({"slow": slow, "fast": fast}, ["a"], seconds=2.0)))
    shown = []
    for frame in range(image.n_frames):
        image.seek(frame)
        light = image.convert("L")
        shown.append((image.info["duration"], *(light.getpixel((x, light.height - 20)) > 128 for x in (150, 260))))
    assert shown == [(1000, False, False), (500, True, False), (500, True, True)]


def test_a_contact_sheet_has_a_row_for_each_video():
    one, three = (contact_sheet(VIDEOS[:n], PROMPTS[:n], frames=4) for n in (1, 3))
    assert three.height == 2 * one.height and three.width == one.width


def test_file_names_are_safe():
    name = file_name(3, "A red/../circle: moves left!", 7)
    assert name == "0003-a-red-circle-moves-left-seed7"
