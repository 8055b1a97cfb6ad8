"""`lightning export`: the weights of a run for use elsewhere."""

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn

from lightning_semgen.errors import UserError
from lightning_semgen.model.wan_weights import wan_config
from lightning_semgen.runs import CONFIG, load_stage
from lightning_semgen.stages.base import Stage


def export(run: str, folder: str, max_shard_size: str = "5GB") -> None:
    """Writes a run's weights as safetensors: the generator's EMA, its text encoder if learnt, the compressor.

    Where the network is Wan's, diffusers' WanTransformer3DModel.from_pretrained(FOLDER, subfolder="transformer") opens
    the generator.

    Args:
        run: folder of the run.
        folder: a new one.
        max_shard_size: of one file; several have an index.
    """
    target = Path(folder)
    if target.exists():
        raise UserError(f"{target} is already there: name a new folder to export {run} to.")
    stage = load_stage(run)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, network in exported_parts(stage).items():
        pattern = (
            "diffusion_pytorch_model{suffix}.safetensors" if name == "transformer" else "model{suffix}.safetensors"
        )
        (partial / name).mkdir(parents=True)
        options = {"filename_pattern": pattern, "max_shard_size": max_shard_size}
        save_torch_state_dict(network.state_dict(), partial / name, **options)
    (partial / "transformer/config.json").write_text(json.dumps(transformer_config(stage), indent=1))
    shutil.copy(Path(run) / CONFIG, partial)
    partial.replace(target)
    print(f"{target}: {', '.join(exported_parts(stage))}{hint(stage)}")


def exported_parts(stage: Stage) -> dict[str, nn.Module]:
    parts = {"transformer": stage.ema.transformer}
    if stage.frozen.text.learnt:
        parts["text_encoder"] = stage.ema.text
    if stage.space is not None:
        parts["compressor"] = stage.space.compressor
    return parts


def transformer_config(stage: Stage) -> dict:
    """The config.json for diffusers. If the network is not Wan's, it names our class and our options."""
    transformer = stage.ema.transformer
    config = wan_config(transformer) | {"rotary_rate": transformer.rotary_rate}
    if is_wan(stage):
        return {"_class_name": "WanTransformer3DModel"} | config
    semantic = getattr(transformer, "semantic_embedding", None)
    ours = {
        "semantic_dim": semantic and semantic.in_features, "absolute_time": hasattr(transformer, "time_embedding"),
        "window_seconds": transformer.window_seconds,
    }  # fmt: skip
    return {"_class_name": type(transformer).__name__} | config | ours


def is_wan(stage: Stage) -> bool:
    """Whether diffusers' network is equivalent: no layers of ours, and steps evenly spaced from 0."""
    transformer = stage.ema.transformer
    ours = any(hasattr(transformer, layer) for layer in ("semantic_embedding", "time_embedding"))
    ours = ours or (transformer.window_seconds is not None and stage.seconds[-1] > transformer.window_seconds)
    seconds = torch.tensor(stage.seconds)
    even = torch.arange(len(seconds)) * seconds[-1] / max(len(seconds) - 1, 1)
    return not ours and torch.allclose(seconds, even, atol=1e-4)


def hint(stage: Stage) -> str:
    """A note if the frame rate differs in diffusers, whose rotary positions are one per latent."""
    if not is_wan(stage):
        return ""
    fps = stage.ema.transformer.rotary_rate * stage.time_stride
    return "" if fps == stage.clip.fps else f"; in diffusers it makes video at {fps:g} fps, not {stage.clip.fps:g}"
