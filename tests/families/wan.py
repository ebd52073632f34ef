"""Wan 2.1 and 2.2."""

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)

from bentoml_diffusers import testing
from families import parts
from families.family import IMAGE, OTHER_IMAGE, VIDEO, Family, Variant, config_of

TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


def make():
    tokenizer = testing.tiny_t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": parts.umt5(tokenizer),
        "vae": parts.wan_vae(),
        "transformer": WanTransformer3DModel(**TRANSFORMER),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
    }


def with_images(known):
    return {
        "image_encoder": parts.vision(),
        "image_processor": parts.image_processor(),
        "transformer": WanTransformer3DModel(
            **config_of(known["transformer"], in_channels=36, image_dim=16, added_kv_proj_dim=24)
        ),
    }


def first_last(known):
    config = config_of(with_images(known)["transformer"], pos_embed_seq_len=2 * 17)
    return {**with_images(known), "transformer": WanTransformer3DModel(**config)}


def two_denoisers(known):
    return {"transformer_2": WanTransformer3DModel(**TRANSFORMER), "boundary_ratio": 0.875}


def vace(known):
    config = {**TRANSFORMER, "vace_layers": [0], "vace_in_channels": 96}
    return {"transformer": WanVACETransformer3DModel(**config)}


FAMILY = Family(
    "Wan",
    make=make,
    arguments={"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16},
    needs=("ftfy",),
    classes={
        "WanPipeline": {},
        "WanImageToVideoPipeline": Variant({"image": IMAGE}, with_images),
        "WanImageToVideoPipeline (first and last frame)": Variant(
            {"image": IMAGE, "last_image": OTHER_IMAGE}, first_last
        ),
        "WanPipeline (two denoisers)": Variant(parts=two_denoisers),
        "WanVideoToVideoPipeline": {"video": VIDEO, "num_frames": None},
        "WanVACEPipeline": Variant({"video": VIDEO}, vace),
    },
)
