"""MobileNet V2 1.0/224 of TensorFlow, frame by frame: real features of real videos from 7 MB of weights."""

import timm
from torch import Tensor, nn

from encoders.base import on_meta
from encoders.published.base import PublishedEncoder, Spec
from encoders.published.checkpoint import open_checkpoint
from encoders.published.loading import FileLayout, build_network, load_strictly
from lightning_semgen.errors import UserError

SPEC = Spec(
    width=1280, depth=0, heads=0, mlp=0, patch=32, tubelet=1, frames=16, size=224,
    mean=(128 / 255,) * 3, std=(128 / 255,) * 3,  # x / 128 − 1
)  # fmt: skip
DOWNLOAD = (
    "`curl -LO https://github.com/google-coral/test_data/raw/master/mobilenet_v2_1.0_224_quant.tflite` (Apache-2.0,"
    " 3.6 MB; write its convolutions, dequantised, in their order, as 00.conv.weight, 00.conv.bias, 01.dw.weight, …)"
)


def network() -> nn.Module:
    """timm's, padded as TensorFlow pads, whose norms only add: the file's convolutions have the rest in them."""
    return timm.create_model("mobilenetv2_100", num_classes=0, pad_type="same", bn_eps=0.0)


class MobileNetV2(PublishedEncoder):
    """The last feature map of each frame, 1280 channels for 32×32 pixels, one step a frame.

    Args:
        weights: folder or file; "random".
    """

    kernel, antialias = "bilinear", True
    alone = True
    short_side = (1, 0.875)

    def __init__(self, weights: str, layer: None = None, **options):
        if layer is not None:
            raise UserError("The encoder mobilenet_v2 gives its last feature map only: leave out the option layer.")
        super().__init__(SPEC, **options)
        if weights == "random" or on_meta():
            self.network = build_network(network, None, (), self.dtype)
        else:
            self.network = network()
            checkpoint = open_checkpoint(weights, download=DOWNLOAD)
            load_strictly(self.network, checkpoint, numbered(self.network), "", self.dtype)

    def tokens(self, pixels: Tensor) -> Tensor:
        cells = self.network.forward_features(pixels.flatten(0, 1).to(self.dtype))
        return cells.movedim(1, -1).unflatten(0, pixels.shape[:2])


def numbered(network: nn.Module) -> FileLayout:
    """A file whose convolutions are numbered in the order of the network; a convolution's bias is its norm's."""
    own, names = network.state_dict(), {}
    layers = [(name, part) for name, part in network.named_modules() if isinstance(part, nn.Conv2d | nn.BatchNorm2d)]
    for number, ((name, convolution), (norm, _)) in enumerate(zip(layers[::2], layers[1::2], strict=True)):
        key = f"{number:02d}." + ("dw" if convolution.groups > 1 else "conv")
        names |= {f"{name}.weight": f"{key}.weight", f"{norm}.bias": f"{key}.bias"}
    return FileLayout("", lambda name, file: file[names[name]] if name in names else own[name], ignorable=r"^52\.conv")
