"""The Wan VAE: diffusers' latents and frames, from chunk to chunk, from published layouts."""

import json

import pytest
import torch
from diffusers import AutoencoderKLWan

from encoders.vae.base import FrozenVAE, build_vae
from encoders.vae.wan import WanVAE
from lightning_semgen.errors import UserError

TINY = {"base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
WAN22 = TINY | {
    "z_dim": 4, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
    "scale_factor_spatial": 16, "latents_mean": [0.1] * 4, "latents_std": [2.0] * 4,
}  # fmt: skip


def theirs(**config) -> AutoencoderKLWan:
    torch.manual_seed(0)
    model = AutoencoderKLWan(**TINY | config)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.normal_(parameter, 1, 0.3)
    return model.eval()


@pytest.mark.parametrize("config", [{}, WAN22], ids=["2.1", "2.2"])
@pytest.mark.parametrize("size", [(9, 32, 64), (1, 64, 32), (13, 48, 48)])
def test_it_is_diffusers(config, size, tmp_path):
    model = theirs(**config)
    model.save_pretrained(tmp_path / "vae")
    vae = build_vae("wan", str(tmp_path))
    frames = torch.randint(256, (2, size[0], 3, *size[1:]), generator=torch.Generator().manual_seed(0)).byte()
    with torch.no_grad():
        reference = model.encode(frames.transpose(1, 2) / 127.5 - 1).latent_dist.mode()
        shown = model.decode(reference).sample
    latents = vae.encode(frames)
    assert latents.shape == (2, vae.channels, *vae.grid(*size))
    assert (latents * vae.std + vae.mean - reference).abs().max() / reference.std() <= 5e-5
    chunks = list(vae.decode_chunks(latents))
    assert [part.shape[1] for part in chunks] == [1] + [4] * (size[0] // 4)
    assert (torch.cat(chunks, dim=1) - (shown.transpose(1, 2) + 1) * 127.5).abs().max() < 0.51  # half a step of uint8


@pytest.mark.parametrize("config", [{}, WAN22], ids=["2.1", "2.2"])
def test_large_frames_go_through_in_diffusers_tiles(config, monkeypatch):
    monkeypatch.setattr("encoders.vae.wan.UNTILED", 0)
    model = theirs(**config)
    ours = WanVAE.from_config(model.config)
    ours.load_state_dict(model.state_dict())
    for vae in (model, ours):
        vae.enable_tiling(64, 64, 48, 48)
    vae = FrozenVAE(ours.eval())
    frames = torch.randint(256, (1, 5, 3, 96, 112), generator=torch.Generator().manual_seed(0)).byte()
    with torch.no_grad():
        reference = model.encode(frames.transpose(1, 2) / 127.5 - 1).latent_dist.mode()
        shown = model.decode(reference).sample
    latents = vae.encode(frames)
    assert (latents * vae.std + vae.mean - reference).abs().max() / reference.std() <= 5e-5
    assert (vae.decode(latents) - (shown.transpose(1, 2) + 1) * 127.5).abs().max() < 0.51


def test_its_own_precision_is_kept(tmp_path):
    theirs().save_pretrained(tmp_path)
    vae, frames = build_vae("wan", str(tmp_path)), torch.randint(256, (1, 5, 3, 32, 32)).byte()
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(frames)
    assert torch.equal(latents, vae.encode(frames))


def test_the_published_sizes():
    with torch.device("meta"):
        vae = build_vae("wan", "random")
    assert sum(p.numel() for p in vae.parameters()) == pytest.approx(126.9e6, rel=1e-3)
    assert vae.channels == 16 and vae.grid(121, 480, 832) == (31, 60, 104)


def test_weights_that_are_not_there_or_not_a_wan_vae(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --include 'vae/\*'"):
        build_vae("wan")
    with pytest.raises(UserError, match="neither a file or folder nor a hub id"):
        build_vae("wan", "nowhere")
    theirs().save_pretrained(tmp_path / "vae")
    config = tmp_path / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_res_blocks": 2}))
    with pytest.raises(UserError, match="lacks"):
        build_vae("wan", str(tmp_path))
    config.write_text(json.dumps({"_class_name": "AutoencoderKLLTXVideo"}))
    with pytest.raises(UserError, match="is no Wan VAE.*AutoencoderKLLTXVideo"):
        build_vae("wan", str(tmp_path))
