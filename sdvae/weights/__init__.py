"""Reading and writing VAEs: diffusers folders, and single files in LDM's, TAESD's or diffusers' layout."""

from sdvae.weights.load import load_autoencoder, load_kl, load_vae
from sdvae.weights.names import from_ldm, to_ldm
from sdvae.weights.save import export_targets, save_as, save_ldm, save_taesd, save_vae

__all__ = [
    "export_targets",
    "from_ldm",
    "load_autoencoder",
    "load_kl",
    "load_vae",
    "save_as",
    "save_ldm",
    "save_taesd",
    "save_vae",
    "to_ldm",
]
