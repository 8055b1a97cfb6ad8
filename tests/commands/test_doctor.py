"""`lightning doctor` pictures what an encoder sees."""

import numpy as np
import pytest
from PIL import Image

from data.toy.world import toy_clip


@pytest.fixture
def video(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.mp4").write_bytes(toy_clip("heldout", 0, 0)[1])
    return "clip.mp4"


@pytest.mark.parametrize("encoder", ["toy", "vae"])
def test_a_picture_of_features_beside_the_frames(encoder, video, lightning):
    lightning("doctor", "--encoder", encoder, "--video", video, "-o", "picture.png", small=False)
    picture = np.asarray(Image.open("picture.png"))
    frames, features = np.split(picture[: len(picture) // 2 * 2], 2)
    assert frames.std() > 10 and features.std() > 10 and not np.array_equal(frames, features)


def test_random_weights_stand_in_for_missing_ones_and_are_said(video, lightning, capsys):
    tiny = [f"--encoder_options.{option}" for option in ("width=48", "depth=1", "heads=4", "mlp=96")]
    command = ("doctor", "--encoder", "4ds_b", *tiny, "--video", video, "-o", "picture.png")
    with pytest.warns(UserWarning, match="random weights"):
        lightning(*command, small=False)
    said = capsys.readouterr().err
    assert "curl -LO" in said and "Random weights are shown instead" in said
    assert Image.open("picture.png").size[0] > 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--encoder", "toy", "--video", "no.mp4"), "The video no.mp4 cannot be used"),
        (("--encoder", "none", "--video", "clip.mp4"), "no features to picture"),
        (("--encoder", "nothing", "--video", "clip.mp4"), "There is no encoder 'nothing'"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, video, fails):
    assert message in fails("doctor", *arguments, small=False)
