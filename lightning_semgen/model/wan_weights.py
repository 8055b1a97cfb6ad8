"""The published weights of Wan 2.1 as the start of a generator, and its config as diffusers writes it."""

import re

import torch
from lightning.pytorch.utilities import rank_zero_info

from encoders.published.checkpoint import Checkpoint, open_checkpoint
from encoders.published.loading import FileLayout, load_strictly
from lightning_semgen.errors import UserError
from lightning_semgen.model.sizes import SIZES, Size
from lightning_semgen.model.transformer import VideoTransformer

LATENTS_PER_SECOND = 4.0  # of Wan 2.1, which saw 16 fps
INPUT, OUTPUT, SEMANTIC, TIME = "patch_embedding", "proj_out", "semantic_embedding", "time_embedding"
TEXT = "condition_embedder.text_embedder.linear_1"
STAGES_OWN = {"in_channels", "out_channels", "patch_size", "text_dim"}  # what a stage may have otherwise than the file


def wan_config(transformer: VideoTransformer) -> dict:
    """What diffusers' `WanTransformer3DModel` calls the facts of a transformer."""
    size, channels = transformer.size, transformer.patch_embedding.in_channels
    return {
        "num_layers": size.depth, "num_attention_heads": size.heads, "attention_head_dim": size.dim // size.heads,
        "ffn_dim": size.ffn_dim, "in_channels": channels, "out_channels": channels,
        "patch_size": list(transformer.patch),
        "text_dim": transformer.get_submodule(TEXT).in_features,
        "freq_dim": transformer.condition_embedder.timesteps_proj.num_channels,
        "eps": transformer.norm_out.eps, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
        "image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None,
    }  # fmt: skip


def load_wan(transformer: VideoTransformer, weights: str) -> None:
    """Fills a transformer from a folder or hub id in diffusers' format, of Wan's transformer or of its pipeline.

    Layers of another shape than the file's stay new. A new output layer is zero, so that the first prediction is. A new
    semantic embedding makes of every semantic token what the input layer makes of an empty latent, whatever the
    semantics: a token that the blocks know, and content that is learnt. It is not nothing: attention sees more tokens.

    UserError where the file is of another size or architecture, lacks a tensor, or has one that we do not know.
    """
    checkpoint = open_checkpoint(weights, subfolder="transformer")
    check_config(transformer, checkpoint)
    checkpoint.require("")
    new = new_layers(transformer, checkpoint)
    own, pattern = transformer.state_dict(), "|".join(rf"^{re.escape(layer)}\." for layer in new) or r"(?!)"
    layout = FileLayout("", lambda name, file: own[name] if re.search(pattern, name) else file[name], ignorable=pattern)
    load_strictly(transformer, checkpoint, layout, "", transformer.scale_shift_table.dtype)
    if SEMANTIC in new and INPUT not in new:
        with torch.no_grad():
            transformer.semantic_embedding.weight.zero_()
            transformer.semantic_embedding.bias.copy_(transformer.patch_embedding.bias)
    loaded = {name: tensor.numel() for name, tensor in own.items() if not re.search(pattern, name)}
    rank_zero_info(f"{checkpoint.path}: {summary(loaded)} loaded; new: {', '.join(new) or 'nothing'}")


def check_config(transformer: VideoTransformer, checkpoint: Checkpoint) -> None:
    """UserError unless config.json, beside the weights, is of a network that differs by a stage's own layers alone."""
    if not (found := checkpoint.json("config.json")):
        raise UserError(
            f"There is no config.json beside {checkpoint.path}: fetch it too, it says what the weights are."
        )
    wanted = {name: value for name, value in wan_config(transformer).items() if name not in STAGES_OWN}
    rate = found.get("rotary_rate", transformer.rotary_rate)  # said by `lightning export` alone
    if rate != transformer.rotary_rate:
        raise UserError(
            f"{checkpoint.path} was trained with a rotary_rate of {rate:g}, here it is {transformer.rotary_rate:g}: set"
            f" model.rotary_rate to {rate:g}."
        )
    wrong = [f"{name} is {found.get(name)}, not {v}" for name, v in wanted.items() if found.get(name) != v]
    if not wrong:
        return
    names = ("num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim")
    heads, head_dim, depth, ffn_dim = (found.get(name) or 0 for name in names)
    size = Size(heads * head_dim, depth, heads, ffn_dim)
    same = [name for name, row in SIZES.items() if row == size != transformer.size]
    remedy = f"set model.size to {same[0]}" if same else "give weights of that size and architecture"
    raise UserError(f"{checkpoint.path} does not fit model.size: {'; '.join(wrong)}; {remedy}.")


def new_layers(transformer: VideoTransformer, checkpoint: Checkpoint) -> list[str]:
    """The layers that a stage has in another shape than the file, or in addition."""

    def differs(layer: str) -> bool:
        name = f"{layer}.weight"
        return name in checkpoint and checkpoint[name].shape != transformer.get_parameter(name).shape

    new = [TEXT] if differs(TEXT) else []
    if differs(INPUT):  # the output is of the same things, even where its shape happens to be the file's
        new += [INPUT, OUTPUT]
    if hasattr(transformer, SEMANTIC) and (f"{SEMANTIC}.weight" not in checkpoint or differs(SEMANTIC)):
        new.append(SEMANTIC)
    if hasattr(transformer, TIME) and f"{TIME}.weight" not in checkpoint:
        new.append(TIME)
    return new


def summary(loaded: dict[str, int]) -> str:
    """Counts of tensors and parameters, and which parts they are of."""
    parts = sorted({name.split(".")[0] for name in loaded})
    return f"{len(loaded)} tensors with {sum(loaded.values()) / 1e6:.1f} million parameters ({', '.join(parts)})"
