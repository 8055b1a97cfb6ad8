"""The embedded encoders keep the contract; VAEs go there and back."""

import pytest
import torch
from conftest import CLIP, save_text_encoder

from data.codec.decode import decode_clip
from data.toy.world import toy_clip
from encoders import build_encoder
from encoders.text import build_text_encoder
from encoders.vae.base import build_vae
from lightning_semgen.errors import UserError


@pytest.fixture(scope="module")
def frames():
    return torch.stack([decode_clip(toy_clip("heldout", index, 0)[1], CLIP) for index in range(2)])


@pytest.mark.parametrize("name", ["toy", "vae"])
def test_contract(name, frames):
    encoder = build_encoder(name)
    times = CLIP.times if encoder.stream == "video" else CLIP.semantic_times
    if encoder.stream == "semantic":
        frames = frames[:, CLIP.semantic_indices]
    features = encoder(frames)
    grid = encoder.grid(frames.shape[1], 48, 48)
    assert features.shape == (2, *grid, encoder.dim) and features.dtype == torch.float32
    assert torch.equal(encoder(frames[1:]), features[1:]) or torch.allclose(
        encoder(frames[1:]), features[1:], atol=1e-5
    )
    seconds = encoder.seconds(times)
    assert len(seconds) == grid[0] and seconds[-1] == times[-1]
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.train().training


def test_toy_encoder_takes_any_number_of_frames_and_any_size(frames):
    encoder = build_encoder("toy")
    assert encoder(frames[:, :3]).shape[1] == 1  # an odd frame fills no tubelet
    long = encoder(frames[:, :10])
    assert long.shape[1] == 5
    torch.testing.assert_close(long[:, :2], encoder(frames[:, :4]))  # windows are independent
    wide = torch.nn.functional.interpolate(frames[0].float(), (64, 112))[None].byte()
    assert encoder(wide[:, :4]).shape == (1, 2, 3, 3, encoder.dim)


def test_token_times_are_those_of_the_last_frame_seen():
    assert build_encoder("toy").seconds(CLIP.semantic_times).tolist() == [0.625, 1.875]
    assert build_vae("toy").seconds(CLIP.times)[:3].tolist() == pytest.approx([0, 4 / 24, 8 / 24])


def test_vae_round_trip_and_normalisation(frames):
    vae = build_vae("toy")
    latents = vae.encode(frames)
    assert latents.shape == (2, vae.channels, *vae.grid(49, 48, 48))
    assert 0.4 < latents.std() < 1.6
    error = (vae.decode(latents).float() - frames.float()).square().mean()
    assert 10 * torch.log10(255**2 / error) > 28
    with pytest.raises(UserError, match="4·k"):
        vae.grid(48, 48, 48)


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_a_vae_makes_of_chunks_what_it_makes_of_the_whole(frames, chunk, monkeypatch):
    vae = build_vae("toy")
    pixels = frames.transpose(1, 2) / 127.5 - 1
    whole = vae.model.encode(pixels).latent_dist.mode()
    monkeypatch.setattr(vae.model, "chunk", chunk)
    latents = vae.encode(frames)
    torch.testing.assert_close(latents * vae.std + vae.mean, whole, atol=1e-5, rtol=1e-5)
    chunks = list(vae.decode_chunks(latents))
    assert len(chunks) == -(-13 // chunk) and chunks[0].shape[1] == min(4 * chunk, 52) - 3
    shown = ((vae.model.decode(whole).sample.transpose(1, 2) + 1) * 127.5).clamp(0, 255)
    assert (torch.cat(chunks, dim=1) - shown).abs().max() < 0.51  # half a step of uint8


def test_vae_features_are_pooled_latents(frames):
    encoder = build_encoder("vae", semantic_grid=(13, 6, 6))
    torch.testing.assert_close(encoder(frames), build_vae("toy").encode(frames).permute(0, 2, 3, 4, 1))
    assert encoder.seconds(CLIP.times).tolist() == build_vae("toy").seconds(CLIP.times).tolist()


@pytest.mark.parametrize(("build", "known"), [(build_encoder, "toy"), (build_vae, "toy")])
def test_unknown_names_list_the_known(build, known):
    with pytest.raises(UserError, match=f"'nothing'.*{known}"):
        build("nothing")


def test_a_transformers_text_encoder_is_padded_with_zeros(tmp_path):
    save_text_encoder(tmp_path, 16)
    encoder = build_text_encoder(str(tmp_path))
    text = encoder.prepare(["a red disc", "a disc"])
    assert text.shape == (2, 512, 16) and not any(p.requires_grad for p in encoder.parameters())
    assert text[0, 4:].abs().max() == 0 and text[1, 3:].abs().max() == 0 and text[0, :4].abs().min() > 0


def test_a_pipelines_text_encoder_says_what_wans_pipeline_does(tmp_path):
    from diffusers import WanPipeline

    save_text_encoder(tmp_path, 16, ("tokenizer", "text_encoder"))
    encoder = build_text_encoder(str(tmp_path))
    pipeline = WanPipeline(encoder.tokenizer, encoder.model, vae=None, scheduler=None)
    captions = ["a  red\n disc ", "a &amp;amp; disc", "", "red " * 600]
    theirs = pipeline._get_t5_prompt_embeds(captions, max_sequence_length=512)
    torch.testing.assert_close(encoder.prepare(captions), theirs)
    with torch.autocast("cpu", torch.bfloat16):  # a fit's precision is not the encoder's
        torch.testing.assert_close(encoder.prepare(captions), theirs)


def test_a_missing_text_encoder_says_how_to_fetch_it():
    with pytest.raises(UserError, match="hf download no/such-model"):
        build_text_encoder("no/such-model")
