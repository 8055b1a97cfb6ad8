"""VideoMAE 2 (arXiv 2303.16727; github.com/OpenGVLab/VideoMAEv2): full attention, a fixed table of positions."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.published.base import PublishedEncoder, Spec
from encoders.published.checkpoint import Checkpoint
from encoders.published.loading import FileLayout, Tensors
from encoders.published.vit import VideoViT, patchify


def read(name: str, file: Tensors) -> Tensor:
    if name.endswith("attn.qkv.bias"):
        q, v = (file[name.replace("qkv.bias", f"{part}_bias")] for part in "qv")
        return torch.cat([q, torch.zeros_like(q), v])  # keys have no bias
    if name.startswith("patch_embed"):
        tensor = file[name.replace("embed", "embed.proj")]
        return tensor.flatten(1) if tensor.ndim == 5 else tensor
    if name.startswith("norm."):  # in a pretraining file; fc_norm after fine-tuning and distillation
        return file[name if name in file else f"fc_{name}"]
    return file[name.replace("mlp.0", "mlp.fc1").replace("mlp.2", "mlp.fc2")]


class VideoMAE2(PublishedEncoder):
    """Tokens after the last norm, which the published classifiers apply to their mean.

    A clip longer than a window (16 frames) is encoded in windows that do not see each other; for a shorter one, and for
    another size than the trained square, the table of positions is resized as the authors do.

    Args:
        final_norm: whether the encoder's last LayerNorm is applied.
    """

    kernel, short_side = "bilinear", (1, 1)
    layouts = (
        FileLayout("patch_embed.proj.weight", read, r"(^|\.)(head|decoder|encoder_to_decoder|mask_token|pos_embed)\b"),
    )

    def __init__(
        self,
        spec: Spec,
        checkpoint: Checkpoint | None,
        final_norm: bool = True,
        layer: int | None = None,
        **options,
    ):
        super().__init__(spec, layer=layer, **options)
        self.network = self.load(partial(VideoViT, spec, norm=True), checkpoint)
        self.network.cut(layer, final_norm)
        self.register_buffer("table", sinusoid_table(spec), persistent=False)

    @staticmethod
    def read_config(config: dict) -> dict:
        """Sizes from the config.json of the Hub's files; {} from any other."""
        if "model_config" not in config:
            return {}
        model = config["model_config"]
        return {
            "width": model["embed_dim"], "depth": model["depth"], "heads": model["num_heads"],
            "mlp": int(model["embed_dim"] * model["mlp_ratio"]), "patch": model["patch_size"],
            "tubelet": model["tubelet_size"], "frames": model["num_frames"], "size": model["img_size"],
        }  # fmt: skip

    def tokens(self, pixels: Tensor) -> Tensor:
        patches = patchify(pixels, self.tubelet, self.spec.patch)
        return self.network(patches, positions=self.positions(*patches.shape[1:4]))

    def positions(self, steps: int, height: int, width: int) -> Tensor:
        """(T', H', W', D): the table, bicubic in space, then linear in time (run_class_finetuning.py)."""
        if (steps, height, width) == self.spec.table:
            return self.table
        table = F.interpolate(self.table.movedim(-1, 1), (height, width), mode="bicubic")
        table = F.interpolate(table.permute(2, 1, 3, 0).flatten(1, 2), steps, mode="linear")
        return table.unflatten(1, (-1, width)).permute(3, 0, 2, 1)


def sinusoid_table(spec: Spec) -> Tensor:
    """(T', H', W', D) of the trained clip: sines of the flattened index, so that another size cannot be computed."""
    steps, height, width = spec.table
    exponent = np.arange(spec.width) // 2 * 2 / spec.width
    angles = np.arange(steps * height * width)[:, None] / np.power(10000, exponent)
    angles[:, 0::2], angles[:, 1::2] = np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])
    return torch.tensor(angles, dtype=torch.float32).view(steps, height, width, -1)
