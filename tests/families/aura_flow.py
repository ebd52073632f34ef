"""AuraFlow."""

from diffusers import AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

from bentoml_diffusers import testing
from bentoml_diffusers.testing.unets import tiny_vae
from families import parts
from families.family import Family


def make():
    tokenizer = testing.tiny_t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": parts.umt5(tokenizer),
        "vae": tiny_vae(),
        "transformer": AuraFlowTransformer2DModel(
            sample_size=4,
            patch_size=1,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pos_embed_max_size=64,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


FAMILY = Family(
    "AuraFlow",
    make=make,
    arguments={"height": 32, "width": 32, "max_sequence_length": 24},
    lora_layers=("to_q", "to_v", "to_out.0", "linear_1", "linear_2"),
    classes={"AuraFlowPipeline": {}},
)
