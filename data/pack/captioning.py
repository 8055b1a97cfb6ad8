"""Captions for videos that have none, by any image-text-to-text model of transformers."""

import torch
from PIL import Image

from data.clip import Clip
from data.codec.decode import decode_clip
from lightning_semgen.errors import UserError

FRAMES, SIDE, TOKENS = 8, 448, 256  # of a video at most, of a frame's shorter side at most, of a caption at most


class Captioner:
    """A model that sees a few frames of a video and answers a prompt; on the GPU, if there is one."""

    def __init__(self, name: str, prompt: str):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            self.processor = AutoProcessor.from_pretrained(name, local_files_only=True)
            self.model = AutoModelForImageTextToText.from_pretrained(name, local_files_only=True, dtype="auto")
        except (OSError, ValueError) as error:
            raise UserError(
                f"caption_with {name!r} is neither a folder nor a model at hand that takes images and text; fetch one"
                f" with `hf download {name}` ({str(error).splitlines()[0]})."
            ) from error
        if not self.processor.chat_template:
            raise UserError(f"caption_with {name!r} has no chat template: name a model that follows instructions.")
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.name, self.prompt = name, prompt

    @torch.no_grad()
    def __call__(self, video: bytes, measured: dict) -> str:
        """The caption of a video of which `probe` has `measured`; the same every time. Raises `Rejected`."""
        content = [{"type": "image", "image": image} for image in frames(video, measured)]
        message = {"role": "user", "content": [*content, {"type": "text", "text": self.prompt}]}
        inputs = self.processor.apply_chat_template(
            [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
        answer = tokens[0, inputs["input_ids"].shape[1] :]
        return self.processor.decode(answer, skip_special_tokens=True).strip()


def frames(video: bytes, measured: dict) -> list[Image.Image]:
    """Frames evenly spread over a video."""
    count = min(FRAMES, measured["frames"])
    scale = min(1, SIDE / min(measured["height"], measured["width"]))
    height, width = (max(1, round(measured[side] * scale)) for side in ("height", "width"))
    rate = count / (measured["duration"] or 1)
    spread = decode_clip(video, Clip(count, height, width, rate, rate), start=0.5 / rate)
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in spread]
