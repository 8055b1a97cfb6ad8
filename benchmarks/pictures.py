"""The pictures of README and docs/tensorboard.md, from a run of `make demo`.   python benchmarks/pictures.py [FOLDER]

FOLDER holds runs/demo_latent_dim8: generated.webp plays the first videos of its test beside their prompts, and
tensorboard_gallery.png is what TensorBoard shows of its last validation, at the middle of the clips.
"""

import io
import sys
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_semgen.video.pictures import contact_sheet

RUN, DOCS = Path("runs/demo_latent_dim8"), Path(__file__).parents[1] / "docs"
VIDEOS, COLUMNS, WIDTH, FPS = 12, 6, 120, 12


def read(path: Path) -> tuple[torch.Tensor, str]:
    """Frames uint8 (T, 3, H, W) of a generated video, and its prompt, which the file carries."""
    with av.open(path) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        return torch.from_numpy(frames).movedim(-1, 1), container.metadata["title"]


def playing(folder: Path) -> None:
    videos, prompts = zip(*map(read, sorted((folder / RUN / "test").glob("*.mp4"))[:VIDEOS]), strict=True)
    steps = torch.stack(videos)[:, :: 24 // FPS]
    pages = [contact_sheet(steps[:, [t]], prompts, 1, WIDTH, COLUMNS) for t in range(steps.shape[1])]
    options = {"duration": 1000 // FPS, "loop": 0, "quality": 80, "method": 6}
    pages[0].save(DOCS / "generated.webp", save_all=True, append_images=pages[1:], **options)


def gallery(folder: Path) -> None:
    events = EventAccumulator(str(folder / RUN), size_guidance={"images": 0}).Reload()
    shown = []
    for tag in ("gallery/videos", "gallery/semantics"):
        image = Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string))
        image.seek(image.n_frames // 2)
        shown.append(image.convert("RGB"))
    page = Image.new("RGB", (max(image.width for image in shown), sum(image.height for image in shown)), "white")
    page.paste(shown[0], (0, 0))
    page.paste(shown[1], (0, shown[0].height))
    page.save(DOCS / "tensorboard_gallery.png", optimize=True)


if __name__ == "__main__":
    where = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    playing(where)
    gallery(where)
