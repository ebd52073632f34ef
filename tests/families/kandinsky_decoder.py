"""Kandinsky 2.2: its decoder, from an image that is encoded already."""

from combined_models import tiny_kandinsky

from families import stable_diffusion as sd
from families.family import Family
from families.parts import embeds


def make():
    components = tiny_kandinsky().components
    return {name: components[name] for name in ("unet", "scheduler", "movq")}


def encoded(seed):
    return {
        "image_embeds": embeds(1, 16, seed=seed),
        "negative_image_embeds": embeds(1, 16, seed=9),
    }


FAMILY = Family(
    "Kandinsky 2.2, decoder",
    make=make,
    prompts=(),
    vary=tuple(encoded(seed) for seed in range(3)),
    arguments={"height": 32, "width": 32},
    classes={
        "KandinskyV22Pipeline": {},
        "KandinskyV22Img2ImgPipeline": sd.IMG2IMG,
    },
)
