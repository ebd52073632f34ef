"""AnimateDiff: Stable Diffusion with motion."""

from diffusers import DDIMScheduler, MotionAdapter, UNetMotionModel

from families import stable_diffusion as sd
from families.family import VIDEO, Family, Variant
from families.stable_diffusion_pag import PAG, WHY


def make():
    found = sd.make()
    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
    )
    return {
        **found,
        "motion_adapter": adapter,
        "unet": UNetMotionModel.from_unet2d(found["unet"], adapter),
        "scheduler": DDIMScheduler(beta_schedule="linear", clip_sample=False),
    }


FAMILY = Family(
    "AnimateDiff",
    make=make,
    arguments={"num_frames": 2, "height": 32, "width": 32},
    classes={
        "AnimateDiffPipeline": {},
        "AnimateDiffVideoToVideoPipeline": {"video": VIDEO[:2], "num_frames": None},
        "AnimateDiffPAGPipeline": Variant(PAG, alone=WHY),
    },
)
