"""What every frozen part is, and what every semantic encoder promises."""

import hashlib

import torch
from torch import Tensor, nn


class Frozen(nn.Module):
    """A module that never trains and is never copied: held outside a stage's module tree, shared by reference."""

    def freeze(self) -> "Frozen":
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)  # Lightning calls train() on everything it finds

    def __deepcopy__(self, memo: dict) -> "Frozen":
        return self

    def fingerprint(self) -> str:
        return fingerprint(self)


def on_meta() -> bool:
    """Whether parts are being built on the meta device, without weights, for their sizes alone."""
    return torch.get_default_device().type == "meta"


def fingerprint(module: nn.Module) -> str:
    """Tells weights apart: a hash of every tensor's name, shape and first values."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.flatten()[:64].tolist()}".encode())
    return digest.hexdigest()


class FrozenEncoder(Frozen):
    """Frames in, features out.

    Attributes:
        dim: D, channels of the features.
        tubelet: frames that one step of the features sees.
        stream: "semantic" (frames at `data.semantic_fps`) or "video" (frames at `data.fps`).
        block: frames, counted from a clip's first, that see each other and no others; None: all may see all.
    """

    dim: int
    tubelet: int
    stream: str = "semantic"
    block: int | None = None

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T', H', W') of the features of a clip of that many frames and that size in pixels."""
        raise NotImplementedError

    def seconds(self, times: Tensor) -> Tensor:
        """Frame times (T,) to token times (T',): when the last frame that a step sees is shown."""
        return times[self.tubelet - 1 :: self.tubelet]

    def preprocess(self, frames: Tensor) -> Tensor:
        """uint8 frames (B, T, 3, H, W) to the pixels the network was trained on, float (B, T, 3, h, w)."""
        raise NotImplementedError

    def features(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels to features (B, T', H', W', D)."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """uint8 frames (B, T, 3, H, W) to features (B, T', H', W', D); frames beyond whole tubelets are unused."""
        whole = frames.shape[1] // self.tubelet * self.tubelet
        return self.features(self.preprocess(frames[:, :whole]))


def pooled_seconds(seconds: Tensor, steps: int) -> Tensor:
    """Token times (T',) after adaptive average pooling of time to that many steps: each is its last token's."""
    last = [-(-(step + 1) * len(seconds) // steps) - 1 for step in range(steps)]
    return seconds[last]
