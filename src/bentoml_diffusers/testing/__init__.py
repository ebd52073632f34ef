"""Tiny pipelines of real diffusers classes, for our tests and for those of users.

Their weights are random but seeded: images mean nothing, yet another prompt, seed or LoRA
gives another image.
"""

from bentoml_diffusers.testing.media import tiny_ltx, tiny_ltx2, tiny_stable_audio
from bentoml_diffusers.testing.modular import (
    save_tiny_ip_adapter,
    tiny_modular_stable_diffusion_xl,
)
from bentoml_diffusers.testing.text import tiny_t5_tokenizer, tiny_tokenizer
from bentoml_diffusers.testing.transformers import (
    tiny_flux,
    tiny_pixart_sigma,
    tiny_stable_diffusion_3,
)
from bentoml_diffusers.testing.unets import (
    save_tiny_lora,
    tiny_controlnet,
    tiny_dance_diffusion,
    tiny_ddpm,
    tiny_ldm,
    tiny_stable_diffusion,
    tiny_stable_diffusion_xl,
)

__all__ = [
    "save_tiny_ip_adapter",
    "save_tiny_lora",
    "tiny_controlnet",
    "tiny_dance_diffusion",
    "tiny_ddpm",
    "tiny_flux",
    "tiny_ldm",
    "tiny_ltx",
    "tiny_ltx2",
    "tiny_modular_stable_diffusion_xl",
    "tiny_pixart_sigma",
    "tiny_stable_audio",
    "tiny_stable_diffusion",
    "tiny_stable_diffusion_3",
    "tiny_stable_diffusion_xl",
    "tiny_t5_tokenizer",
    "tiny_tokenizer",
]
