"""Text encoders: a small one learnt with the generator from bytes, or any frozen one of transformers."""

import warnings
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, PretrainedConfig, UMT5Config

from encoders.base import Frozen, on_meta
from lightning_semgen.errors import UserError

UMT5_XXL = {  # of google/umt5-xxl, Wan's text encoder
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
}  # fmt: skip


class ByteTextEncoder(nn.Module):
    """Learnt from bytes, without a vocabulary: captions of up to 96 bytes to 24 embeddings.

    Two strided convolutions gather bytes into about words, two transformer layers let words meet.
    """

    max_bytes, max_tokens, learnt = 96, 24, True

    def __init__(self, dim: int = 128):
        super().__init__()
        self.dim = dim
        self.bytes = nn.Embedding(257, dim, padding_idx=256)
        self.gather = nn.Sequential(
            nn.Conv1d(dim, dim, 5, stride=2, padding=2), nn.GELU(), nn.Conv1d(dim, dim, 5, stride=2, padding=2)
        )
        # Larger than what the convolutions give at first: where they are small, the order of words is hardly learnt.
        self.positions = nn.Parameter(torch.randn(self.max_tokens, dim) * 0.5)
        layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True, norm_first=True)
        self.mix = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(dim), enable_nested_tensor=False)

    def prepare(self, captions: list[str]) -> Tensor:
        """Byte values (B, 96), padded with 256; what is longer is cut, with a warning."""
        if any(len(caption.encode()) > self.max_bytes for caption in captions):
            warnings.warn(f"Captions of more than {self.max_bytes} bytes are cut by text_encoder bytes.", stacklevel=2)
        rows = [list(c.encode()[: self.max_bytes]) for c in captions]
        return torch.tensor([row + [256] * (self.max_bytes - len(row)) for row in rows], device=self.positions.device)

    def forward(self, ids: Tensor) -> Tensor:
        """Byte values (B, 96) to embeddings (B, 24, dim)."""
        return self.mix(self.gather(self.bytes(ids).transpose(1, 2)).transpose(1, 2) + self.positions)


class FrozenTextEncoder(Frozen):
    """A text encoder of transformers: captions to embeddings padded with zeros to `max_tokens`, as Wan has it."""

    learnt = False

    def __init__(self, name: str, max_tokens: int = 512):
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean
        from transformers import AutoModelForTextEncoding, AutoTokenizer

        super().__init__()
        parts = ("tokenizer", "text_encoder") if in_pipeline(name) else ("", "")
        try:
            if on_meta():
                self.model = AutoModelForTextEncoding.from_config(text_config(name, parts[1]))
            else:
                self.tokenizer = AutoTokenizer.from_pretrained(name, subfolder=parts[0])
                self.model = AutoModelForTextEncoding.from_pretrained(name, subfolder=parts[1])
        except (OSError, ValueError) as error:
            raise UserError(
                f"The text encoder {name!r} is neither 'bytes' nor a folder nor a model at hand; fetch it with"
                f" `hf download {name}` or give its folder ({str(error).splitlines()[0]})."
            ) from error
        self.dim, self.max_tokens, self.clean = self.model.config.hidden_size, max_tokens, prompt_clean

    @torch.no_grad()
    def embed(self, captions: list[str]) -> list[Tensor]:
        """Embeddings (L, dim) of each caption, as long as it is, `max_tokens` at most."""
        tokens = self.tokenizer(
            [self.clean(caption) for caption in captions],
            padding=True, max_length=self.max_tokens, truncation=True, return_tensors="pt",
        ).to(self.model.device)  # fmt: skip
        with torch.autocast(self.model.device.type, enabled=False):  # the same in `fit` and `encode`
            embeddings = self.model(**tokens).last_hidden_state.float()
        return [row[mask.bool()] for row, mask in zip(embeddings, tokens.attention_mask, strict=True)]

    @cached_property
    def empty(self) -> Tensor:
        """Embeddings (L, dim) of the empty prompt."""
        return self.embed([""])[0]

    def pad(self, embeddings: list[Tensor]) -> Tensor:
        """Embeddings (B, max_tokens, dim)."""
        padded = pad_sequence([row.to(self.model.device) for row in embeddings], batch_first=True)
        return F.pad(padded, (0, 0, 0, self.max_tokens - padded.shape[1]))

    def prepare(self, captions: list[str]) -> Tensor:
        """Embeddings (B, max_tokens, dim)."""
        return self.pad(self.embed(captions))


def text_config(name: str, subfolder: str) -> PretrainedConfig:
    """The config of an encoder of transformers; that of Wan's is known where it is not at hand."""
    try:
        return AutoConfig.from_pretrained(name, subfolder=subfolder)
    except (OSError, ValueError):
        if not name.startswith("Wan-AI/"):
            raise
        return UMT5Config(**UMT5_XXL)


def in_pipeline(name: str) -> bool:
    """Whether that folder, or hub id in the local cache, is a pipeline of diffusers, with parts in subfolders."""
    config = "text_encoder/config.json"
    if (Path(name) / config).is_file():
        return True
    return not Path(name).exists() and name.count("/") <= 1 and isinstance(try_to_load_from_cache(name, config), str)


def build_text_encoder(name: str) -> ByteTextEncoder | FrozenTextEncoder:
    """`bytes`, or the hub id or folder of an encoder of transformers, or of a pipeline of diffusers with one."""
    return ByteTextEncoder() if name == "bytes" else FrozenTextEncoder(name).freeze()
