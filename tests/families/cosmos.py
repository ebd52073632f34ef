"""Cosmos."""

import torch
from diffusers import CosmosTransformer3DModel, FlowMatchEulerDiscreteScheduler

from bentoml_diffusers import testing
from bentoml_diffusers.testing.text import tiny_t5
from families import parts
from families.family import IMAGE, Family, Variant


class Checker(torch.nn.Module):
    """Stands for the guardrails, which are models of gigabytes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("place", torch.zeros(1))
        self.device, self.dtype = self.place.device, self.place.dtype

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, video):
        return video


def transformer(**more):
    return CosmosTransformer3DModel(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "mlp_ratio": 2,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (4, 32, 32),
            "patch_size": (1, 2, 2),
            "rope_scale": (2.0, 1.0, 1.0),
            "concat_padding_mask": False,  # it needs torchvision
            "extra_pos_embed_type": "learnable",
            **more,
        }
    )


def make():
    tokenizer = testing.tiny_t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": tiny_t5(tokenizer),
        "vae": parts.wan_vae(),
        "transformer": transformer(in_channels=16, out_channels=16, extra_pos_embed_type=None),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        "safety_checker": Checker(),
    }


FAMILY = Family(
    "Cosmos",
    make=make,
    arguments={"height": 32, "width": 32, "max_sequence_length": 16},
    without={"store": "the safety checker is a stand-in"},
    classes={
        "Cosmos2TextToImagePipeline": {},
        "Cosmos2VideoToWorldPipeline": Variant(
            {"image": IMAGE, "num_frames": 5},
            lambda known: {
                "transformer": transformer(
                    in_channels=17, out_channels=16, extra_pos_embed_type=None
                )
            },
        ),
    },
)
