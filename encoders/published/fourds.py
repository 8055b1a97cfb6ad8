"""4DS (arXiv 2412.15212; github.com/google-deepmind/representations4d): full attention, learned positions."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.published.base import PublishedEncoder, Spec
from encoders.published.checkpoint import Checkpoint
from encoders.published.loading import FileLayout, Tensors
from encoders.published.vit import VideoViT, patchify

NAMES = {
    "pos_embed": "encoder/posenc/embeddings",
    "patch_embed.": "encoder/patch_embedding/Conv_0/",
    "blocks.": "processor/layers_",
    ".norm1.weight": "/attention_norm/scale", ".norm1.bias": "/attention_norm/bias",
    ".norm2.weight": "/mlp_norm/scale", ".norm2.bias": "/mlp_norm/bias",
    ".attn.proj.": "/attention/out/", ".attn.qkv.": "/attention/qkv/",
    ".mlp.0.": "/mlp/dense_in/", ".mlp.2.": "/mlp/dense_out/",
    "weight": "kernel",
}  # fmt: skip


def read(name: str, file: Tensors) -> Tensor:
    """Flax keeps inputs before outputs, heads on an axis of their own, and a convolution as (t, y, x, in, out)."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    if "qkv" in name:
        parts = [file[name.replace("qkv", part)] for part in ("query", "key", "value")]
        return torch.cat([part.flatten(1).T if "kernel" in name else part.flatten() for part in parts])
    tensor = file[name]
    if name.endswith("Conv_0/kernel"):
        return tensor.permute(4, 3, 0, 1, 2).flatten(1)
    return tensor.flatten(0, -2).T if "kernel" in name else tensor


class LearnedPositions(VideoViT):
    """The transformer with the published table of positions (T', H', W', D)."""

    def __init__(self, spec: Spec):
        super().__init__(spec, norm=False, gelu="tanh")
        self.pos_embed = nn.Parameter(torch.randn(*spec.table, spec.width) * 0.02)


class FourDS(PublishedEncoder):
    """Tokens after 95% of the blocks, without a norm (representations4d/models/model.py, EncoderToReadout).

    A clip longer than a window (16 frames) is encoded in windows that do not see each other; for a shorter one, and for
    another size than the trained square, the table of positions is resized (cubic, as jax.image.resize does).
    """

    kernel = "lanczos"
    layouts = (FileLayout("encoder/patch_embedding/Conv_0/kernel", read, r"^params/layers_[^0]"),)

    def __init__(self, spec: Spec, checkpoint: Checkpoint | None, layer: int | None = None, **options):
        super().__init__(spec, layer=layer, **options)
        self.network = self.load(partial(LearnedPositions, spec), checkpoint)
        # Their list of features holds the patches twice, and lacks the last block's.
        self.network.cut(int((spec.depth + 1) * 0.95) - 2 if layer is None else layer, final_norm=False)

    @staticmethod
    def read_config(config: dict) -> dict:
        """{}: the published files come alone."""
        return {}

    def tokens(self, pixels: Tensor) -> Tensor:
        patches = patchify(pixels, self.tubelet, self.spec.patch)
        return self.network(patches, positions=self.positions(*patches.shape[1:4]))

    def positions(self, steps: int, height: int, width: int) -> Tensor:
        """(T', H', W', D): the table, cubic in space and time."""
        if (steps, height, width) == self.spec.table:
            return self.network.pos_embed
        table = self.network.pos_embed.float().movedim(-1, 0)  # (D, T', H', W')
        table = F.interpolate(table, (height, width), mode="bicubic", antialias=True).flatten(2)[None]
        table = F.interpolate(table, (steps, height * width), mode="bicubic", antialias=True)[0]
        return table.unflatten(2, (height, width)).movedim(0, -1)
