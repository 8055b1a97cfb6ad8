"""Encoded shards teach what video shards teach."""

import pytest
import torch
from conftest import CLIP, CONFIGS, stage

from data.batch import collate
from data.datasets import ClipDataset, Stream
from data.encoded.encoding import Encoding
from data.encoded.precompute import precompute_shards
from data.encoded.shards import check_fingerprint
from data.shards.index import index_path
from data.shards.reader import Shards
from lightning_semgen.errors import UserError
from lightning_semgen.stages.latent import LatentStage
from lightning_semgen.stages.semantic import SemanticStage


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory) -> str:
    """A folder with a tiny random T5 encoder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "small", "big", "circle", "moves", "left", "up"]
    vocabulary = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    vocabulary.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(words), d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=32)
    T5EncoderModel(config).save_pretrained(folder)
    return str(folder)


def encoding(made, folder) -> Encoding:
    return Encoding(folder, made.frozen.fingerprint(), made.frozen.precompute)


def batches(made, shards, folder):
    """The same four training samples from video shards and from those that a stage makes of them."""
    clips = ClipDataset(Shards(str(shards / "shards/toy/heldout-*.tar")), CLIP)
    precompute_shards(clips, [encoding(made, folder)], batch_size=3, workers=0)
    for dataset in (clips, ClipDataset(Shards(str(folder / "*.tar")), CLIP)):
        stream = Stream(dataset, seed=0, open_shards=1)
        yield collate([stream[position] for position in range(4)])


@pytest.mark.parametrize("cls", [SemanticStage, LatentStage])
def test_losses_are_those_of_video_shards_and_the_text_encoder_rests(cls, shards, tmp_path, text_encoder):
    made = stage(cls, text_encoder=text_encoder, prompt_dropout=0.5)
    video, encoded = batches(made, shards, tmp_path / "enc")
    lengths = [len(ids) for ids in made.frozen.text.tokenizer(video["caption"]).input_ids]
    assert [len(text) for text in encoded["text"]] == lengths and "frames" not in encoded
    torch.testing.assert_close(made.frozen.prompt(encoded, 0.5), made.frozen.prompt(video, 0.5), rtol=1e-3, atol=1e-3)
    loss = made.training_step(video, 0)["loss"]
    calls = []
    made.frozen.text.model.register_forward_hook(lambda *args: calls.append(args))
    again = made.training_step(encoded, 0)["loss"]
    torch.testing.assert_close(again, loss, rtol=1e-3, atol=0)
    assert not calls  # the empty prompt is known by now
    mute = encoded | {"text": [torch.zeros_like(text) for text in encoded["text"]]}
    assert not torch.equal(made.training_step(mute, 0)["loss"], again)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """A run that learnt a compressor, as far as another stage looks into it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "checkpoints").mkdir()
    torch.save(checkpoint_of(stage(SemanticStage, compressor_steps=-1)), folder / "checkpoints/last.ckpt")
    return str(folder)


def checkpoint_of(made) -> dict:
    checkpoint = {"state_dict": made.state_dict(), "global_step": 0}
    made.on_save_checkpoint(checkpoint)
    return checkpoint


@pytest.mark.parametrize("cls", [SemanticStage, LatentStage])
def test_semantics_in_place_of_features_give_the_same_samples_and_losses(cls, shards, tmp_path, run):
    made = stage(cls, compressor=run, encode_semantics=True)
    made.space.load_compressor(run)
    video, encoded = batches(made, shards, tmp_path / "enc")
    assert "features" not in encoded and encoded["moments"].shape == (4, 2, 3, 3, 2 * 8)
    torch.testing.assert_close(made.space(encoded), made.space(video), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        made.training_step(encoded, 0)["loss"], made.training_step(video, 0)["loss"], rtol=1e-3, atol=0
    )
    made.validation_step(encoded, 0)

    expected = made.space.loaded
    torch.nn.init.normal_(made.space.compressor.mlp[0].weight)
    torch.save(checkpoint_of(made), tmp_path / "other.ckpt")
    made.space.load_compressor(str(tmp_path / "other.ckpt"))
    with pytest.raises(UserError, match=f"made with compressor '{expected}', the config says '{made.space.loaded}'"):
        check_fingerprint(tmp_path / "enc", made.frozen.fingerprint())
    with pytest.raises(UserError, match=f"made with compressor '{expected}', the config says None"):
        check_fingerprint(tmp_path / "enc", stage(cls).frozen.fingerprint())


def test_shards_of_other_videos_are_refused(workspace, lightning, fails):
    fit = ("fit", "-c", f"{CONFIGS}/dim8.yaml", "--trainer.max_steps=2", "--model.compressor_steps=1")
    lightning(*fit)
    said = fails(*fit, "--data.min_duration=1.5", "--ckpt_path=last")
    assert "made with min_duration 0.0, the config says 1.5" in said


def test_what_a_killed_process_had_begun_is_removed(shards, tmp_path):
    made, folder = stage(SemanticStage), tmp_path / "enc"
    list(batches(made, shards, folder))
    (whole,) = folder.glob("*.tar")
    begun = whole.with_name(f"{whole.name}.0123.partial")
    whole.rename(begun)
    index_path(whole).unlink()
    list(batches(made, shards, folder))
    assert whole.exists() and not begun.exists()


def test_semantics_need_a_frozen_compressor():
    with pytest.raises(UserError, match="encode_semantics.*name the run"):
        stage(SemanticStage, encode_semantics=True)


def test_a_learnt_text_encoder_reads_captions(shards, tmp_path, text_encoder):
    made = stage(SemanticStage, text_encoder=text_encoder)
    _, encoded = batches(made, shards, tmp_path / "enc")
    learnt = stage(SemanticStage)
    check_fingerprint(tmp_path / "enc", learnt.frozen.fingerprint())
    learnt.training_step(encoded, 0)["loss"]
    clips = ClipDataset(Shards(str(shards / "shards/toy/heldout-*.tar")), CLIP)
    precompute_shards(clips, [encoding(learnt, tmp_path / "other")], batch_size=16, workers=0)
    with pytest.raises(UserError, match=f"made with text_encoder None, the config says '{text_encoder}'"):
        check_fingerprint(tmp_path / "other", made.frozen.fingerprint())
