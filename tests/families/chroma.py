"""Chroma."""

from diffusers import ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from bentoml_diffusers import testing
from bentoml_diffusers.testing.text import tiny_t5
from bentoml_diffusers.testing.unets import tiny_vae
from families import stable_diffusion as sd
from families.family import Family, Variant


def make():
    tokenizer = testing.tiny_t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": tiny_t5(tokenizer, width=32),
        "vae": tiny_vae(shift=0.1),
        "transformer": ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8,
            approximator_hidden_dim=32,
            approximator_layers=1,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


FAMILY = Family(
    "Chroma",
    make=make,
    arguments={"height": 32, "width": 32, "max_sequence_length": 24},
    classes={
        "ChromaPipeline": {},
        "ChromaImg2ImgPipeline": sd.IMG2IMG,
        "ChromaInpaintPipeline": Variant(
            sd.INPAINT, broken="diffusers 0.42.1 reads an entry that its config has not"
        ),
    },
)
