"""PIA: AnimateDiff from an image."""

from diffusers import MotionAdapter, UNetMotionModel

from families import animatediff
from families.family import IMAGE, Family


def make():
    known = animatediff.make()
    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
        conv_in_channels=9,
    )
    base = animatediff.sd.make()["unet"]
    return {**known, "motion_adapter": adapter, "unet": UNetMotionModel.from_unet2d(base, adapter)}


FAMILY = Family(
    "PIA",
    make=make,
    arguments={"num_frames": 2, "height": 32, "width": 32, "image": IMAGE},
    classes={"PIAPipeline": {}},
)
