"""PixArt, and its perturbed attention guidance."""

from bentoml_diffusers import testing
from families.family import Family, Variant
from families.stable_diffusion_pag import PAG, WHY


def make():
    return dict(testing.tiny_pixart_sigma().components)


FAMILY = Family(
    "PixArt",
    make=make,
    arguments={
        "height": 32,
        "width": 32,
        "max_sequence_length": 24,
        "use_resolution_binning": False,
        "clean_caption": False,
    },
    classes={
        "PixArtSigmaPipeline": {},
        "PixArtAlphaPipeline": {},
        "PixArtSigmaPAGPipeline": Variant({**PAG}, alone=WHY),
    },
)
