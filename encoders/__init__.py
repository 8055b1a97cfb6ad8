"""The registry of frozen semantic encoders: one table, one function.

base.py     what a frozen part is, what an encoder promises
toy.py      the embedded encoder, a tiny VideoMAE
text.py     text encoders: learnt from bytes, or of transformers
published/  the encoders that others have published
vae/        video VAEs behind one interface; the VAE as an encoder
weights/    the embedded weights
"""

from dataclasses import dataclass, fields, replace
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from encoders.base import FrozenEncoder, on_meta
from encoders.published.base import Spec
from encoders.published.checkpoint import INDEX, Checkpoint, open_checkpoint
from lightning_semgen.errors import UserError

WEIGHTS = Path(__file__).parent / "weights"  # of the embedded parts


@dataclass(frozen=True)
class Row:
    """Where an encoder's adapter is, which weights it takes by default, and their licence.

    Attributes:
        adapter: module:class.
        weights: folder, file or hub id.
        licence: of the weights; one that begins with "non-commercial" is said when they are loaded.
        spec: sizes of a published model.
        files: what is needed of the hub id, the weights last.
        download_size: of these files.
        url: of the weights, where they are not on the hub.
        run: whether it was run here at full size, with random weights.
    """

    adapter: str
    weights: str | None
    licence: str
    spec: Spec | None = None
    files: tuple[str, ...] = ()
    download_size: str = ""
    url: str | None = None
    run: bool = True

    @property
    def download(self) -> str:
        """The command that fetches the default weights, and their size."""
        command = f"curl -LO {self.url}" if self.url else f"hf download {self.weights} {' '.join(self.files)}"
        return f"`{command}` ({self.download_size})"


QWEN = {
    "adapter": "encoders.published.qwen2_5_vl:Qwen2_5_VL",
    "files": ("config.json", "preprocessor_config.json", INDEX),
    "download_size": "under 1 MB; it names the files with the vision tower, which are then asked for",
}
VJEPA2 = {
    "adapter": "encoders.published.vjepa2:VJEPA2",
    "licence": "MIT",
    "files": ("config.json", "model.safetensors"),
}
VIDEOMAE2 = {
    "adapter": "encoders.published.videomae2:VideoMAE2",
    "licence": "non-commercial (CC-BY-NC-4.0)",
    "files": ("config.json", "model.safetensors"),
}
FOURDS = {"adapter": "encoders.published.fourds:FourDS", "licence": "CC-BY-4.0"}
FOURDS_URL = "https://storage.googleapis.com/representations4d/checkpoints"


def qwen_spec(mlp: int, out: int) -> Spec:
    return Spec(
        1280, 32, 16, mlp, patch=14, frames=768, size=None, out=out, full_attention=(7, 15, 23, 31),
        mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
    )  # fmt: skip


def vjepa2_spec(width: int, depth: int, heads: int, mlp: int, size: int = 256) -> Spec:
    return Spec(width, depth, heads, mlp, frames=64, size=size)


def fourds_spec(width: int, depth: int, heads: int, mlp: int) -> Spec:
    return Spec(width, depth, heads, mlp, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


ENCODERS: dict[str, Row | None] = {
    "toy": Row("encoders.toy:ToyEncoder", str(WEIGHTS / "toy_encoder"), "Apache-2.0, trained here on the toy world"),
    "vae": Row("encoders.vae:VAEEncoder", None, "that of the VAE"),
    "none": None,  # no semantics: LatentStage becomes the one-stage baseline
    "qwen2_5_vl_3b": Row(
        weights="Qwen/Qwen2.5-VL-3B-Instruct",
        licence="non-commercial (Qwen Research)",
        spec=qwen_spec(3420, 2048),
        **QWEN,
    ),
    "qwen2_5_vl_7b": Row(
        weights="Qwen/Qwen2.5-VL-7B-Instruct", licence="Apache-2.0", spec=qwen_spec(3420, 3584), **QWEN
    ),
    "qwen2_5_vl_32b": Row(
        weights="Qwen/Qwen2.5-VL-32B-Instruct", licence="Apache-2.0", spec=qwen_spec(3456, 5120), **QWEN
    ),
    "qwen2_5_vl_72b": Row(weights="Qwen/Qwen2.5-VL-72B-Instruct", licence="Qwen", spec=qwen_spec(3456, 8192), **QWEN),
    "vjepa2_large": Row(
        weights="facebook/vjepa2-vitl-fpc64-256",
        spec=vjepa2_spec(1024, 24, 16, 4096),
        download_size="about 1.3 GB",
        **VJEPA2,
    ),
    "vjepa2_huge": Row(
        weights="facebook/vjepa2-vith-fpc64-256",
        spec=vjepa2_spec(1280, 32, 16, 5120),
        download_size="about 2.6 GB",
        **VJEPA2,
    ),
    "vjepa2_giant": Row(
        weights="facebook/vjepa2-vitg-fpc64-256",
        spec=vjepa2_spec(1408, 40, 22, 6144),
        download_size="about 4.1 GB",
        run=False,
        **VJEPA2,
    ),
    "vjepa2_giant_384": Row(
        weights="facebook/vjepa2-vitg-fpc64-384",
        spec=vjepa2_spec(1408, 40, 22, 6144, size=384),
        download_size="about 4.1 GB",
        run=False,
        **VJEPA2,
    ),
    "videomae2_small": Row(
        weights="OpenGVLab/VideoMAE2",
        spec=Spec(384, 12, 6, 1536),
        download_size="about 0.1 GB",
        **VIDEOMAE2 | {"licence": "Apache-2.0", "files": ("distill/vit_s_k710_dl_from_giant.pth",)},
    ),
    "videomae2_base": Row(
        weights="OpenGVLab/VideoMAEv2-Base", spec=Spec(768, 12, 12, 3072), download_size="about 0.35 GB", **VIDEOMAE2
    ),
    "videomae2_large": Row(
        weights="OpenGVLab/VideoMAEv2-Large", spec=Spec(1024, 24, 16, 4096), download_size="about 1.2 GB", **VIDEOMAE2
    ),
    "videomae2_huge": Row(
        weights="OpenGVLab/VideoMAEv2-Huge", spec=Spec(1280, 32, 16, 5120), download_size="about 2.5 GB", **VIDEOMAE2
    ),
    "videomae2_giant": Row(
        weights="OpenGVLab/VideoMAEv2-giant",
        spec=Spec(1408, 40, 16, 6144, patch=14),
        download_size="about 4.1 GB",
        run=False,
        **VIDEOMAE2,
    ),
    "4ds_b": Row(
        weights="scaling4d_dist_b.npz",
        spec=fourds_spec(768, 12, 12, 3072),
        url=f"{FOURDS_URL}/scaling4d_dist_b.npz",
        download_size="334 MB",
        **FOURDS,
    ),
    "4ds_e": Row(
        weights="scaling4d_e.npz",
        spec=fourds_spec(1792, 56, 16, 15360),
        url=f"{FOURDS_URL}/scaling4d_e.npz",
        download_size="14 GB",
        run=False,
        **FOURDS,
    ),
    "mobilenet_v2": Row(
        "encoders.published.mobilenet_v2:MobileNetV2", "mobilenet_v2_100_224_deq.safetensors", "Apache-2.0"
    ),
    "timm/<model>": Row("encoders.published.timm_image:TimmEncoder", None, "that of the model"),
}


def build_encoder(name: str, weights: str | None = None, **overrides) -> FrozenEncoder | None:
    """The encoder of that name, frozen; None for "none".

    Args:
        name: a key of `ENCODERS`; an unknown one is a UserError that lists them.
        weights: a folder, file or hub id to load instead of the row's own weights, in any layout that the family is
            published in; "random" for tests of everything else.
        overrides: the adapter's own options; of a published family also the fields of `Spec`, which win over a
            config.json beside the weights, which wins over the row.
    """
    row = row_of(name)
    if row is None:
        return None
    module, adapter = row.adapter.split(":")
    adapter = getattr(import_module(module), adapter)
    sizes = {field.name for field in fields(Spec)} if row.spec else set()
    if unknown := overrides.keys() - (known := options_of(adapter) | sizes):
        raise UserError(
            f"The encoder {name!r} has no option {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}."
        )
    if name.startswith("timm/"):
        overrides["model"] = name.removeprefix("timm/")
    if row.spec is None:
        return adapter(weights or row.weights, **overrides).freeze()
    checkpoint = None if weights == "random" or on_meta() else published_weights(name, row, weights)
    config = adapter.read_config(checkpoint.json("config.json")) if checkpoint else {}
    spec = replace(row.spec, **config | {key: overrides.pop(key) for key in sizes & overrides.keys()})
    return adapter(spec, checkpoint, **overrides).freeze()


def row_of(name: str) -> Row | None:
    row_name = "timm/<model>" if name.startswith("timm/") else name
    if row_name not in ENCODERS:
        raise UserError(f"There is no encoder {name!r}; known encoders: {', '.join(ENCODERS)}.")
    return ENCODERS[row_name]


def options_of(adapter: type[FrozenEncoder]) -> set[str]:
    """What its constructor, and those that it passes options on to, can be told."""
    constructors = [base.__init__ for base in adapter.__mro__ if issubclass(base, FrozenEncoder)]
    parameters = [parameter for function in constructors for parameter in signature(function).parameters.values()]
    return {parameter.name for parameter in parameters if parameter.default is not Parameter.empty}


def published_weights(name: str, row: Row, weights: str | None) -> Checkpoint:
    """The checkpoint of a row, or other weights of its family; says so where its licence is non-commercial."""
    if row.licence.startswith("non-commercial"):
        rank_zero_warn(f"The weights of {name} are {row.licence}.")
    if weights is None:
        return open_checkpoint(row.weights, row.files[-1] if row.files else None, row.download)
    return open_checkpoint(weights)
