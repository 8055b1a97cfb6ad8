"""Generated videos are decoded as they are written: little memory, and the first seconds on disk before the last."""

import os
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch
from conftest import ROOT

from encoders.vae.base import build_vae
from lightning_semgen.video.generated import GeneratedVideo, LatentVideo
from lightning_semgen.video.pictures import evenly

VAE = build_vae("toy")


def latents(steps: int) -> torch.Tensor:
    return torch.randn(VAE.channels, steps, 6, 6, generator=torch.Generator().manual_seed(0))


def playable(path: Path) -> int:
    """Frames that a player finds in a file."""
    with av.open(path) as file:
        return sum(1 for _ in file.decode(video=0))


def test_chunks_are_the_video_and_preview_frames_are_evenly_spaced():
    for steps in (1, 13, 61):
        video, whole = LatentVideo(latents(steps), VAE), VAE.decode(latents(steps)[None])[0]
        assert torch.equal(torch.cat(list(video)), whole) and len(video) == len(whole)
        assert torch.equal(video.preview, evenly(whole, min(len(whole), 128)))
    assert torch.equal(LatentVideo(latents(61), VAE).preview, video.preview)  # before it has been watched


def test_a_file_plays_before_the_last_frames_are_decoded(tmp_path):
    path, played = tmp_path / "long.mp4", []

    class Watched(LatentVideo):
        def __iter__(self):
            for chunk in super().__iter__():
                yield chunk
                played.append(playable(path) if path.exists() and path.stat().st_size > 1000 else 0)

    GeneratedVideo(Watched(latents(121), VAE), 8.0, "a red circle", 3).save(path)
    decoded = [1 + 4 * min(16 * chunk + 15, 120) for chunk in range(8)]
    # x264 looks ahead, and a fragment lasts two seconds.
    assert all(there > frames - 64 for there, frames in zip(played, decoded, strict=True))
    assert playable(path) == 481
    with av.open(path) as file:
        assert file.metadata["title"] == "a red circle" and file.metadata["comment"] == "seed=3"
        assert file.duration == pytest.approx(481 / 8 * 1e6) and file.streams.video[0].start_time == 0
    again = tmp_path / "again.mp4"
    GeneratedVideo(LatentVideo(latents(121), VAE), 8.0, "a red circle", 3).save(again)
    assert again.read_bytes() == path.read_bytes()


def test_memory_does_not_grow_with_length(tmp_path):
    code = """
import resource, sys, torch
from data.codec.mp4 import write_mp4
from encoders.vae import build_vae
from lightning_semgen.video.generated import LatentVideo
torch.set_num_threads(1)
vae = build_vae("toy")
for seconds in (5, 60):
    write_mp4(LatentVideo(torch.randn(vae.channels, 6 * seconds + 1, 6, 6), vae), sys.argv[1], growing=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path / "video.mp4")]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    short, long = (int(line) / 1024 for line in done.stdout.split())  # MB
    assert long - short < 6  # a minute is 10 MB, and 40 before it is rounded to bytes
