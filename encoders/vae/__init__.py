"""Video VAEs: frames to latents and back.

base.py   what a VAE promises, the table of them, the VAE as a semantic encoder
toy.py    the embedded one
wan.py    that of Wan 2.1 and 2.2, chunk by chunk
taef2.py  TAEF2, the tiny image autoencoder of FLUX.2's latents
"""

from encoders.vae.base import FrozenVAE, VAEEncoder, build_vae

__all__ = ["FrozenVAE", "VAEEncoder", "build_vae"]
