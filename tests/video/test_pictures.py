"""TensorBoard shows moving pictures; metrics count what they say."""

import io

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from data.toy.world import Composition, compositions, render
from lightning_semgen.evaluation.adherence import Adherence, wilson_lower
from lightning_semgen.evaluation.channel_statistics import ChannelStatistics
from lightning_semgen.evaluation.flow_loss_bands import FlowLossBands
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


def test_channel_statistics_are_those_of_all_batches():
    z, kl = torch.randn(6, 2, 3, 3, 5) * torch.arange(1, 6) + 7, torch.rand(6, 2, 3, 3, 5)
    statistics = ChannelStatistics(5)
    for rows in (slice(0, 4), slice(4, 6)):
        statistics.update(z[rows], kl[rows])
    found = statistics.compute()
    tokens = z.double().flatten(0, -2)
    torch.testing.assert_close(found["mean"], tokens.mean(0))
    torch.testing.assert_close(found["std"], tokens.std(0, correction=0))
    torch.testing.assert_close(found["KL"], kl.double().flatten(0, -2).mean(0))


def test_a_contact_sheet_has_a_row_for_each_video():
    one, three = (contact_sheet(VIDEOS[:n], PROMPTS[:n], frames=4) for n in (1, 3))
    assert three.height == 2 * one.height and three.width == one.width


def test_file_names_are_safe():
    name = file_name(3, "A red/../circle: moves left!", 7)
    assert name == "0003-a-red-circle-moves-left-seed7"


def test_bands_of_t_hold_the_means_of_their_samples():
    bands = FlowLossBands()
    bands.update(torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.2]))
    bands.update(torch.tensor([5.0]), torch.tensor([1.0]))
    assert bands.compute() == {"": 3.0, "t 0.00-0.25": 2.0, "t 0.75-1.00": 5.0}


def test_adherence_counts_right_attributes():
    import numpy as np

    shown = [render(c, np.random.default_rng(0)) for c in compositions("heldout")[:4]]
    videos = torch.from_numpy(np.stack(shown))
    infos = [vars(c) for c in compositions("heldout")[:4]]
    adherence = Adherence()
    adherence.update(videos, infos)
    assert all(adherence.compute()[name] == 1 for name in Adherence.attributes)
    wrong = Composition("red" if infos[0]["colour"] != "red" else "blue", "none", "none", "small")
    adherence.update(videos[:1], [vars(wrong)])
    adherence.update(videos[:1], [{"caption": "of which nothing else is known"}])
    assert adherence.compute()["colour"] == pytest.approx(4 / 5)


def test_wilson_bound_against_the_textbook():
    assert wilson_lower(0.9, 10) == pytest.approx(0.5958, abs=1e-4)
    assert wilson_lower(0.0, 10) == pytest.approx(0, abs=1e-9)
