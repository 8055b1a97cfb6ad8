"""Any image encoder of timm, frame by frame: DINOv3, SigLIP 2, … (the comparison that the paper leaves out)."""

from functools import partial

import timm
import torch
from lightning.pytorch.utilities import rank_zero_warn
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from encoders.base import on_meta
from encoders.published.base import PublishedEncoder, Spec
from encoders.published.checkpoint import open_checkpoint
from encoders.published.loading import FileLayout, build_network, load_strictly
from lightning_semgen.errors import UserError

LAYOUT = FileLayout("", lambda name, file: file[name], r"^(head|fc|classifier)\b")
PASS = 16  # frames


def network(model: str) -> nn.Module:
    """timm's own class, without a head; a vision transformer takes any size."""
    if not timm.is_model(model):
        raise UserError(f"timm has no model {model!r}: timm.list_models(pretrained=True) lists them.")
    try:
        return timm.create_model(model, num_classes=0, dynamic_img_size=True)
    except TypeError:  # a convolutional network takes any size anyway
        return timm.create_model(model, num_classes=0)


class TimmEncoder(PublishedEncoder):
    """The last feature map of each frame, one step a frame.

    Args:
        weights: folder, file or hub id, in timm's names; None: those that the model's name stands for; "random".
        model: timm's name of model and weights, vit_base_patch16_dinov3.lvd1689m.
        final_norm: whether the network's last norm is applied.
    """

    alone = True

    def __init__(
        self,
        weights: str | None,
        model: str,
        final_norm: bool = True,
        layer: int | None = None,
        window: int = PASS,
        **options,
    ):
        random, facts = weights == "random" or on_meta(), get_pretrained_cfg(model)
        net = build_network(partial(network, model), None, (), torch.float32) if random else network(model)
        last = net.feature_info[-1]
        spec = Spec(
            width=last["num_chs"], depth=len(net.feature_info), heads=0, mlp=0, patch=last["reduction"], tubelet=1,
            frames=1, size=facts.input_size[-1], mean=tuple(facts.mean), std=tuple(facts.std),
        )  # fmt: skip
        super().__init__(spec, layer=layer, window=window, **options)
        self.kernel, self.antialias = facts.interpolation, True
        self.short_side = None if facts.crop_mode == "squash" else (1, facts.crop_pct)
        self.indices, self.final_norm = 1 if layer is None else [layer - 1], final_norm
        if not random:
            self.fill(net, weights or facts.hf_hub_id, facts.license or "")
        self.network = net.to(self.dtype)

    def fill(self, net: nn.Module, weights: str, licence: str) -> None:
        if "nc" in licence:
            rank_zero_warn(f"The weights {weights} are non-commercial ({licence}).")
        checkpoint = open_checkpoint(weights, download=f"`hf download {weights} model.safetensors`")
        load_strictly(net, checkpoint, LAYOUT, "", self.dtype)

    def tokens(self, pixels: Tensor) -> Tensor:
        (cells,) = self.network.forward_intermediates(
            pixels.flatten(0, 1).to(self.dtype), indices=self.indices, norm=self.final_norm, intermediates_only=True
        )
        return cells.movedim(1, -1).unflatten(0, pixels.shape[:2])
