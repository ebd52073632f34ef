"""SkyReels V2."""

from diffusers import SkyReelsV2Transformer3DModel, UniPCMultistepScheduler

from families import wan
from families.family import Family, Variant


def make():
    return {
        **wan.make(),
        "transformer": SkyReelsV2Transformer3DModel(**wan.TRANSFORMER),
        "scheduler": UniPCMultistepScheduler(
            flow_shift=8.0, use_flow_sigmas=True, prediction_type="flow_prediction"
        ),
    }


FAMILY = Family(
    "SkyReels V2",
    make=make,
    arguments={"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16},
    needs=("ftfy",),
    classes={
        "SkyReelsV2Pipeline": {},
        "SkyReelsV2DiffusionForcingPipeline": Variant(
            without={"cancel": "it steps copies of its scheduler: no step is counted"}
        ),
    },
)
