"""Captions from a model of transformers: a tiny one of random weights, saved and loaded as a real one is."""

import io
import shutil

import numpy as np
import pytest
import torch
from test_pack import samples, table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from data.codec.mp4 import write_mp4
from data.pack.captioning import frames
from data.pack.probe import probe

WORDS = ["<image>", "<pad>", "<s>", "</s>", "what", "?", "USER", "red", "blue", "big", "small", "box", "ball", "moves"]
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<image> ' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endfor %}{{ ' USER' if add_generation_prompt }}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The folder of a LLaVA of two layers that looks at 16 x 16 pixels and knows 14 words."""
    folder = str(tmp_path_factory.mktemp("model"))
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", additional_special_tokens=["<image>"]
        ),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size, image_size=16, patch_size=8),
        text_config=LlamaConfig(**size, vocab_size=len(WORDS)),
        image_token_id=0,
    )
    network = LlavaForConditionalGeneration(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)  # so large that what it says depends on all that it sees
    network.save_pretrained(folder)
    return folder


def film(*greys: int) -> bytes:
    """A frame of each grey, at 24 fps."""
    buffer = io.BytesIO()
    write_mp4(np.repeat(np.uint8(greys), 3 * 32 * 48).reshape(-1, 3, 32, 48), buffer)
    return buffer.getvalue()


def test_the_frames_that_the_model_sees_are_evenly_spread():
    video = film(*range(16, 240, 4))  # 56
    pictures = frames(video, probe(video))
    seen = [np.asarray(picture).mean() for picture in pictures]
    assert pictures[0].size == (48, 32)
    np.testing.assert_allclose(seen, [16 + 4 * frame for frame in range(3, 56, 7)], atol=4)
    assert len(frames(film(9, 99), probe(film(9, 99)))) == 2


def test_what_has_no_caption_gets_one(model, tmp_path, lightning, monkeypatch):
    monkeypatch.setattr("data.pack.captioning.TOKENS", 48)
    for name, video in {"dark": film(*[20] * 8), "bright": film(*range(8, 200, 8)), "told": film(*[9] * 8)}.items():
        (tmp_path / f"{name}.mp4").write_bytes(video)
    rows = [{"path": "dark.mp4"}, {"path": "bright.mp4", "caption": " "}, {"path": "told.mp4", "caption": "mine"}]
    source = table(tmp_path / "t.jsonl", *rows)
    for out in ("one", "two"):
        options = ["--caption_with", model, "--caption_prompt", "what ?", "--workers=0"]
        lightning("pack", str(source), str(tmp_path / out), *options, small=False)
    infos = samples(tmp_path / "one")
    assert infos == samples(tmp_path / "two")
    assert infos["told"]["caption"] == "mine" and "captioned_with" not in infos["told"]
    for name in ("dark", "bright"):
        assert infos[name]["captioned_with"] == model
        assert set(infos[name]["caption"].split()) <= set(WORDS)
    assert infos["dark"]["caption"] != infos["bright"]["caption"]


def test_a_model_that_cannot_chat_is_one_sentence(model, tmp_path, fails):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").unlink()
    (tmp_path / "a.mp4").write_bytes(film(1, 2))
    said = fails("pack", str(tmp_path), str(tmp_path / "out"), f"--caption_with={tmp_path / 'model'}", small=False)
    assert "has no chat template" in said


def test_a_missing_model_is_one_sentence(tmp_path, fails):
    (tmp_path / "a.mp4").write_bytes(film(1, 2))
    said = fails("pack", str(tmp_path), str(tmp_path / "out"), "--caption_with=some/model", small=False)
    assert "fetch one with `hf download some/model`" in said and not (tmp_path / "out").exists()
