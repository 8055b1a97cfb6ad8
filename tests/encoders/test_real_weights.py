"""Small published weights through the same adapters; they are not in the repository."""

import json
import os
import re
from pathlib import Path

import av
import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED
from safetensors.torch import load_file

from data.clip import Clip
from encoders import build_encoder
from encoders.vae.base import build_vae
from lightning_semgen.errors import UserError
from lightning_semgen.stages.latent import LatentStage

WEIGHTS = Path(os.environ.get("SEMGEN_WEIGHTS", SHARED / "weights"))
MOBILENET = WEIGHTS / "mobilenet_v2_100_224_deq.safetensors"
CLIPS = Path(os.environ.get("SEMGEN_CLIPS", SHARED / "clips"))
needs_weights = pytest.mark.skipif(not WEIGHTS.is_dir(), reason="no small weights: name them in SEMGEN_WEIGHTS")
needs_clips = pytest.mark.skipif(not CLIPS.is_dir(), reason="no folder of wild clips: name one in SEMGEN_CLIPS")


def first_frame(clip: str, height: int, width: int) -> torch.Tensor:
    """uint8 (1, 1, 3, H, W), scaled by bicubic interpolation."""
    with av.open(CLIPS / "clips" / clip) as container:
        frame = next(container.decode(video=0)).reformat(width, height, "rgb24", interpolation="BICUBIC")
    return torch.from_numpy(frame.to_ndarray()).permute(2, 0, 1)[None, None]


@needs_weights
@needs_clips
def test_taef2_makes_the_round_trip_of_the_authors_network():
    frames = first_frame("sam2_01_dog.mp4", 352, 640)
    vae = build_vae("taef2", str(WEIGHTS))
    latents = vae.encode(frames)
    assert latents.shape == (1, 32, 1, 44, 80) and 0.75 < latents.std() < 0.9
    error = (vae.decode(latents).float() - frames.float()).square().mean()
    assert 10 * torch.log10(255**2 / error) == pytest.approx(29.16, abs=0.15)  # theirs, over the first 17 frames


def run_graph(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The last feature map and the logits of the list of operations beside the weights, with TensorFlow's padding."""
    tensors = load_file(MOBILENET)
    values = {0: pixels}
    for op in json.loads(MOBILENET.with_suffix(".json").read_text())["graph"]:
        if op["op"] in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            x, weight, stride = values[op["inp"]], tensors[f"{op['param']}.weight"].float(), op["stride"]
            pad = [max((-(-n // stride) - 1) * stride + weight.shape[-1] - n, 0) for n in (x.shape[3], x.shape[2])]
            x = F.pad(x, [half for n in pad for half in (n // 2, n - n // 2)])
            x = F.conv2d(x, weight, tensors[f"{op['param']}.bias"], stride, groups=op["groups"])
            values[op["out"]] = x = x.clamp(0, 6) if op["act"] == "relu6" else x
        elif op["op"] == "ADD":
            values[op["out"]] = values[op["inp"]] + values[op["inp2"]]
        elif op["op"] == "AVERAGE_POOL_2D":
            cells, values[op["out"]] = values[op["inp"]], values[op["inp"]].mean((2, 3), keepdim=True)
    return cells, x


@needs_weights
@needs_clips
def test_mobilenet_is_the_published_graph_and_knows_a_dog():
    encoder = build_encoder("mobilenet_v2", str(MOBILENET), resolution="authors")
    frames = first_frame("sam2_01_dog.mp4", 352, 640)
    cells, logits = run_graph(encoder.preprocess(frames)[0])
    torch.testing.assert_close(encoder(frames)[0, 0], cells[0].movedim(0, -1), atol=1e-4, rtol=0)
    label = (WEIGHTS / "imagenet_labels_1001.txt").read_text().splitlines()[logits.argmax()]
    assert re.search("dog|retriever|terrier|spaniel|poodle|corgi|hound", label), label


def test_mobilenet_takes_any_size_and_says_what_it_needs():
    encoder = build_encoder("mobilenet_v2", "random")
    frames = torch.randint(256, (1, 3, 3, 64, 96), dtype=torch.uint8)
    assert encoder(frames).shape == (1, *encoder.grid(3, 64, 96), 1280) == (1, 3, 2, 3, 1280)
    assert encoder.seconds(torch.tensor([0.0, 0.6, 1.2])).tolist() == pytest.approx([0.0, 0.6, 1.2])
    with pytest.raises(UserError, match="mobilenet_v2_100_224_deq.safetensors are not here.*google-coral"):
        build_encoder("mobilenet_v2")


@needs_weights
def test_a_latent_stage_takes_a_vae_that_keeps_time():
    clip = Clip(18, 32, 32, 24.0, 4.0)  # no 4k + 1
    made = LatentStage(clip=clip, vae="taef2", vae_weights=str(WEIGHTS))
    assert made.latent_shape == (32, 18, 4, 4) and made.seconds == tuple(clip.times.tolist())
    assert made.ema.transformer.rotary_rate == 24.0  # whole positions, one a latent
    frames = torch.randint(256, (2, 18, 3, 32, 32), dtype=torch.uint8)
    latents = made.frozen.latents({"frames": frames})
    torch.testing.assert_close(made.frozen.latents({"frames": frames[1:, 5:6]})[0, :, 0], latents[1, :, 5])
    made.vae.model.chunk = 4
    torch.testing.assert_close(made.frozen.latents({"frames": frames}), latents)
    chunks = list(made.vae.decode_chunks(latents))
    assert [part.shape[1] for part in chunks] == [4, 4, 4, 4, 2]
    assert torch.cat(chunks, dim=1).shape == frames.shape


@needs_weights
def test_a_published_wan_latent_is_normalised_as_ours_are():
    latents = torch.load(WEIGHTS / "test_latents_wan.pth", "cpu", weights_only=True).float()
    vae = build_vae("wan", "random")  # the statistics are the config's
    assert latents.shape[:2] == (1, vae.channels) and 0.8 < latents.std() < 1.2
    assert ((latents - vae.mean) / vae.std).std() < 0.7  # normalised once is enough
    assert (latents * vae.std + vae.mean).std() > 1.5


def test_missing_weights_and_frames_that_are_no_whole_tokens(tmp_path):
    with pytest.raises(UserError, match="madebyollin/taesd"):
        build_vae("taef2")
    with pytest.raises(UserError, match=f"There is no {tmp_path}/taef2_encoder.pth"):
        build_vae("taef2", str(tmp_path))
    with pytest.raises(UserError, match="There is no folder nowhere"):
        build_vae("toy", "nowhere")
    with pytest.raises(UserError, match="multiples of 16"):
        LatentStage(clip=Clip(49, 48, 56, 24.0, 1.6))
