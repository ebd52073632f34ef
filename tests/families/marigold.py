"""Marigold: depth and normals of an image."""

from diffusers import LCMScheduler, UNet2DConditionModel

from families import parts
from families import stable_diffusion as sd
from families.family import IMAGE, OTHER_IMAGE, Family, config_of


def make():
    known = sd.make()
    config = config_of(known["unet"], in_channels=8)
    return {
        **known,
        **parts.clip_of_77_tokens(),
        "unet": UNet2DConditionModel(**config),
        "scheduler": LCMScheduler(prediction_type="v_prediction", timestep_spacing="trailing"),
        "prediction_type": "depth",
        "scale_invariant": True,
        "shift_invariant": True,
    }


FAMILY = Family(
    "Marigold",
    make=make,
    prompts=(),
    vary=({"image": IMAGE}, {"image": OTHER_IMAGE}, {"image": IMAGE}),
    arguments={"processing_resolution": 0},
    classes={"MarigoldDepthPipeline": {}},
)
