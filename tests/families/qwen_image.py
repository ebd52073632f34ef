"""Qwen-Image and its editing."""

import importlib

from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

from families import parts
from families import stable_diffusion as sd
from families.family import IMAGE, Family, Variant


def make():
    tokenizer = parts.qwen_vl_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": parts.qwen_vl(tokenizer),
        "vae": parts.qwen_vae(),
        "transformer": QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=parts.WIDTH,
            axes_dims_rope=(8, 4, 4),
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift_terminal=0.02, time_shift_type="exponential"
        ),
    }


def shrink(name):
    """Editing brings each image to a million pixels: here to a thousand."""
    page = importlib.import_module(f"diffusers.pipelines.qwenimage.pipeline_qwenimage_{name}")
    size = page.calculate_dimensions
    page.calculate_dimensions = lambda area, ratio: size(min(area, 32 * 32), ratio)


for name in ("edit", "edit_inpaint", "edit_plus"):
    shrink(name)


def editing(arguments):
    return Variant(
        arguments,
        lambda known: {"processor": parts.QwenProcessor(known["tokenizer"])},
        without={"store": "the processor is a stand-in: transformers' own needs torchvision"},
    )


FAMILY = Family(
    "Qwen-Image",
    make=make,
    arguments={"height": 32, "width": 32, "negative_prompt": "bad", "true_cfg_scale": 2.0},
    classes={
        "QwenImagePipeline": {},
        "QwenImageImg2ImgPipeline": sd.IMG2IMG,
        "QwenImageInpaintPipeline": sd.INPAINT,
        "QwenImageEditPipeline": editing({"image": IMAGE}),
        "QwenImageEditInpaintPipeline": editing(sd.INPAINT),
        "QwenImageEditPlusPipeline": editing({"image": [IMAGE]}),
    },
    quick=("QwenImagePipeline",),
)
