"""`lightning fit --help` and the like: the options that a person sets first, from the docstrings that explain them.

The docstrings are read from the source: importing the classes would take seconds.
"""

import ast
import textwrap
from pathlib import Path

from docstring_parser import parse

ROOT = Path(__file__).parents[1]
SOURCES = {  # of the options of model.* and data.*: file and class
    "model": [
        ("lightning_semgen/stages/base.py", "Stage"),
        ("lightning_semgen/stages/semantic.py", "SemanticStage"),
        ("lightning_semgen/stages/latent.py", "LatentStage"),
    ],
    "data": [("data/datamodule.py", "VideoDataModule")],
}
TRAINER = {
    "max_steps": "optimiser steps of the fit.",
    "devices": "GPUs of this machine, or processes on a CPU.",
    "strategy": "ddp, fsdp2 or fsdp on several GPUs.",
    "precision": "32-true, bf16-mixed or bf16-true.",
    "default_root_dir": "folder of the run; default: runs/<name of the config>.",
}
COMMON = {
    "-c CONFIG": "a file of configs/, or config.yaml of a run.",
    "--seed_everything N": "seed of everything random.",
}
CHECKPOINT = {"--ckpt_path PATH": "the checkpoint to start from: last, a run or a file."}
FIRST = {  # command: what it does, options of its own, options by group
    "fit": (
        "Trains a stage.",
        COMMON | CHECKPOINT,
        {
            "model": ["encoder", "semantic_dim", "compressor", "size", "init_from", "lr", "checkpoint_blocks"],
            "data": [
                "train_shards",
                "val_shards",
                "encoded",
                "batch_size",
                "num_frames",
                "height",
                "width",
                "num_workers",
            ],
            "trainer": list(TRAINER),
        },
    ),
    "validate": (
        "Computes losses and pictures on the validation clips of a run.",
        COMMON | CHECKPOINT,
        {"model": ["semantic_run"], "data": ["val_shards", "batch_size"], "trainer": ["devices", "strategy"]},
    ),
    "test": (
        "Generates videos for held-out captions and measures them.",
        COMMON | CHECKPOINT,
        {
            "model": ["semantic_run", "guidance_scale", "sampling_steps", "sampler"],
            "data": ["val_shards", "batch_size", "samples_per_prompt"],
            "trainer": ["devices", "strategy"],
        },
    ),
    "predict": (
        "Generates videos from prompts or reference videos.",
        COMMON | CHECKPOINT,
        {
            "model": ["semantic_run", "guidance_scale", "semantic_guidance_scale", "sampling_steps", "sampler"],
            "data": ["prompts", "reference", "samples_per_prompt", "batch_size"],
            "trainer": ["devices", "strategy"],
        },
    ),
}
INDENT, WIDTH = 30, 110


def short_help(command: str) -> str:
    """The help of one of Lightning's commands."""
    purpose, own, groups = FIRST[command]
    lines = [f"usage: lightning {command} -c CONFIG [OPTIONS]", "", purpose, ""]
    lines += [row(name, text) for name, text in own.items()]
    for group, names in groups.items():
        texts = TRAINER if group == "trainer" else documented(group)
        lines += ["", *(row(f"--{group}.{name}", texts[name]) for name in names)]
    last = f"Every option: lightning {command} --help all; those of a stage: --model.help SemanticStage or LatentStage."
    return "\n".join([*lines, "", last])


def documented(group: str) -> dict[str, str]:
    """What the docstrings say of the options of a group."""
    texts = {}
    for file, name in SOURCES[group]:
        tree = ast.parse((ROOT / file).read_text())
        (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        texts |= {each.arg_name: each.description or "" for each in parse(ast.get_docstring(found) or "").params}
    return texts


def row(name: str, text: str) -> str:
    indent = " " * INDENT
    wrapped = textwrap.wrap(" ".join(text.split()), WIDTH - INDENT) or [""]
    return (
        f"  {name}".ljust(INDENT) + f"\n{indent}".join(wrapped)
        if len(name) < INDENT - 3
        else (f"  {name}\n{indent}" + f"\n{indent}".join(wrapped))
    )
