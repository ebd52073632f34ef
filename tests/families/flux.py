"""Flux."""

from bentoml_diffusers import testing
from families import stable_diffusion as sd
from families.family import Family


def make():
    return dict(testing.tiny_flux().components)


FAMILY = Family(
    "Flux",
    make=make,
    arguments={"height": 32, "width": 32, "max_sequence_length": 24},
    classes={
        "FluxPipeline": {},
        "FluxImg2ImgPipeline": sd.IMG2IMG,
        "FluxInpaintPipeline": sd.INPAINT,
    },
    quick=("FluxPipeline",),
)
