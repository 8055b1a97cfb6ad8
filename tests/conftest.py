"""Toy shards made once, and the command run in this process."""

import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing import start_processes

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)

from data.clip import Clip  # noqa: E402
from data.toy.shards import render_toy_world  # noqa: E402
from lightning_semgen.cli import main  # noqa: E402

ROOT = Path(__file__).parents[1]
CONFIGS, SHARED = ROOT / "configs", ROOT.parent / "shared"  # what is shared lies beside a checkout
ON_CPU = SimpleNamespace(root_device=torch.device("cpu"))  # a strategy, as the data looks at it
CLIP = Clip(49, 48, 48, 24.0, 1.6)
LONG = Clip(241, 48, 48, 4.0, 0.2666667)  # of configs/long.yaml


@pytest.fixture(autouse=True)
def few_clips_are_measured(monkeypatch):
    monkeypatch.setattr("lightning_semgen.stages.semantic_space.MEASURED_CLIPS", 16)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A folder with few clips in shards/{toy,toy_long}/{train,heldout}-*.tar, where the configs expect them."""
    folder = tmp_path_factory.mktemp("world")
    for split, clips, long_clips in (("train", 40, 8), ("heldout", 16, 4)):
        render_toy_world(str(folder / f"shards/toy/{split}-*.tar"), split, clips, CLIP)
        render_toy_world(str(folder / f"shards/toy_long/{split}-*.tar"), split, long_clips, LONG, scenes=4)
    return folder


def see(shards: Path, folder: Path) -> Path:
    """Has a folder see the session's shards."""
    for path in (shards / "shards").glob("*/*.tar*"):
        link = folder / path.relative_to(shards)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    return folder


@pytest.fixture
def workspace(shards, tmp_path, monkeypatch) -> Path:
    """An empty current folder that sees the session's shards."""
    monkeypatch.chdir(see(shards, tmp_path))
    return tmp_path


def stage(cls, clip=CLIP, **options):
    """A stage without a trainer, whose generator is no longer the one that predicts 0."""
    torch.manual_seed(0)
    made = cls(clip=clip, sampling_steps=2, **options)
    for network in (made.generator, made.ema):
        torch.nn.init.normal_(network.transformer.proj_out.weight, std=0.1)
    made.log = lambda *args, **kwargs: None  # there is no trainer
    made._trainer = None
    return made


def save_text_encoder(folder: Path, dim: int, parts: tuple[str, str] = ("", "")) -> None:
    """A small UMT5 with embeddings of that width, and a tokenizer of a few words, in these subfolders."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", "a", "red", "disc", "&"))}
    vocabulary = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    vocabulary.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>").save_pretrained(folder / parts[0])
    config = UMT5Config(vocab_size=len(words), d_model=dim, num_layers=2, num_heads=2, d_kv=8, d_ff=32)
    UMT5EncoderModel(config).save_pretrained(folder / parts[1])


SMALL = [
    "--data.toy_clips=0", "--data.batch_size=4", "--data.num_workers=0", "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
    "--model.sampling_steps=2",
]  # fmt: skip


@pytest.fixture
def lightning(monkeypatch):
    """Runs the command as a user would, small; returns when it ends, raises SystemExit when it fails."""

    def command(*args: str, small: bool = True) -> None:
        monkeypatch.setattr(sys, "argv", ["lightning", *args, *(SMALL if small else [])])
        main()

    return command


def _rank(rank: int, port: int, nodes: int, args: list[str]) -> None:
    node, local_rank = divmod(rank, 2 // nodes)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(local_rank), "GROUP_RANK": str(node), "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": str(2 // nodes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    sys.argv = ["lightning", *args]
    main()


def on_two_ranks(*args: str, nodes: int = 1) -> None:
    """Runs the command in two processes that find each other as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    devices = ["--trainer.accelerator=cpu", f"--trainer.num_nodes={nodes}", f"--trainer.devices={2 // nodes}"]
    start_processes(_rank, (port, nodes, [*args, *devices]), nprocs=2, start_method="fork")


@pytest.fixture
def fails(lightning, capsys):
    """Runs the command, which must fail; returns what it says."""

    def command(*args: str, **options) -> str:
        with pytest.raises(SystemExit) as stop:
            lightning(*args, **options)
        assert stop.value.code not in (0, None)
        return f"{stop.value.code} {capsys.readouterr().err}"

    return command
