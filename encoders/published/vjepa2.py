"""V-JEPA 2 (arXiv 2506.09985; github.com/facebookresearch/vjepa2): full attention, rotary in t, y and x."""

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from encoders.published.base import PublishedEncoder, Spec, check_choice
from encoders.published.checkpoint import Checkpoint
from encoders.published.loading import FileLayout, Tensors
from encoders.published.vit import VideoViT, patchify

AUTHORS_NAMES = {"patch_embed": "patch_embed.proj", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
TRANSFORMERS_NAMES = AUTHORS_NAMES | {
    "patch_embed": "embeddings.patch_embeddings.proj", "blocks.": "layer.", ".attn.": ".attention."
}  # fmt: skip


def rename(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


def read_authors(name: str, file: Tensors) -> Tensor:
    tensor = file[rename(name, AUTHORS_NAMES)]
    return tensor.flatten(1) if name == "patch_embed.weight" else tensor


def read_transformers(name: str, file: Tensors) -> Tensor:
    name = rename(name, TRANSFORMERS_NAMES)
    if ".qkv." in name:
        return torch.cat([file[name.replace("qkv", part)] for part in ("query", "key", "value")])
    tensor = file["layernorm" + name.removeprefix("norm") if name.startswith("norm.") else name]
    return tensor.flatten(1) if tensor.ndim == 5 else tensor


class VJEPA2(PublishedEncoder):
    """Tokens after the last norm.

    A clip longer than a window (64 frames) is encoded in windows that do not see each other.

    Args:
        final_norm: whether the encoder's last LayerNorm is applied.
        positions: "integer" counts cells, as the authors do, beyond the trained square too; "interpolated" spans the
            trained square with any number of them, as V-JEPA 2.1 does.
        source: which encoder of an authors' .pt file: "target_encoder" (the EMA, which their evaluations use) or
            "encoder" (of which the Hub's files were made).
    """

    kernel, short_side = "bilinear", (256, 224)
    layouts = (
        FileLayout("patch_embed.proj.weight", read_authors, r"^pos_embed$|^((target_)?encoder|predictor|opt|scaler)\."),
        FileLayout(
            "embeddings.patch_embeddings.proj.weight", read_transformers, r"(^|\.)(predictor|pooler|classifier)\."
        ),
    )

    def __init__(
        self,
        spec: Spec,
        checkpoint: Checkpoint | None,
        final_norm: bool = True,
        positions: Literal["integer", "interpolated"] = "integer",
        source: Literal["encoder", "target_encoder"] = "target_encoder",
        layer: int | None = None,
        **options,
    ):
        super().__init__(spec, layer=layer, **options)
        check_choice("positions", positions, ("integer", "interpolated"))
        check_choice("source", source, ("encoder", "target_encoder"))
        self.interpolated = positions == "interpolated"
        self.network = self.load(partial(VideoViT, spec, norm=True), checkpoint, source)
        self.network.cut(layer, final_norm)

    @staticmethod
    def read_config(config: dict) -> dict:
        """Sizes from a config.json of transformers; {} from any other."""
        if config.get("model_type") != "vjepa2":
            return {}
        return {
            "width": config["hidden_size"], "depth": config["num_hidden_layers"],
            "heads": config["num_attention_heads"], "mlp": int(config["hidden_size"] * config["mlp_ratio"]),
            "patch": config["patch_size"], "tubelet": config["tubelet_size"],
            "frames": config["frames_per_clip"], "size": config["crop_size"],
        }  # fmt: skip

    def tokens(self, pixels: Tensor) -> Tensor:
        patches = patchify(pixels, self.tubelet, self.spec.patch)
        return self.network(patches, rotary=self.rotary(patches.shape[1:4], pixels.device))

    def rotary(self, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin (N, head width): a third of the channels each for t, y and x, a rest that does not turn."""
        head = self.spec.width // self.spec.heads
        third = head // 3 // 2 * 2
        omega = 1 / 10000 ** (torch.arange(third // 2, dtype=torch.float32, device=device) / (third / 2))
        axes = [torch.arange(n, device=device, dtype=torch.float32) for n in grid]
        if self.interpolated:
            cells = self.spec.size // self.spec.patch
            axes[1:] = [torch.linspace(0, cells - 1, n, dtype=torch.float32, device=device) for n in grid[1:]]
        t, y, x = (axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
        # The frequencies are tiled where pairs are neighbours: an oversight that the weights have learnt with.
        angles = torch.cat([(axis[:, None] * omega).repeat(1, 2) for axis in (t, y, x)], dim=1)
        angles = torch.nn.functional.pad(angles, (0, head - 3 * third))
        return angles.cos(), angles.sin()
