"""Kandinsky 5."""

from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5Transformer3DModel

from bentoml_diffusers.testing.unets import tiny_vae
from families import parts
from families.family import Family


def transformer(**more):
    return Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=parts.WIDTH,
        in_text_dim2=16,
        time_dim=16,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 2, 2),
        **more,
    )


def make():
    tokenizer, clip = parts.qwen_vl_tokenizer(), parts.clip_of_77_tokens()
    return {
        "tokenizer": parts.QwenProcessor(tokenizer),
        "text_encoder": parts.qwen_vl(tokenizer),
        "tokenizer_2": clip["tokenizer"],
        "text_encoder_2": clip["text_encoder"],
        "vae": tiny_vae(),
        "transformer": transformer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
    }


def adjust(pipeline):
    """It brings each size to one that it knows; those of its models are of a million pixels."""
    pipeline.resolutions = [(32, 32)]


FAMILY = Family(
    "Kandinsky 5",
    make=make,
    adjust=adjust,
    arguments={"height": 32, "width": 32, "max_sequence_length": 1024},
    lora_layers=("to_query", "to_key", "to_value"),
    alone="its requests run one after another here; the cause is open",
    without={"store": "the processor is a stand-in: transformers' own needs torchvision"},
    classes={
        "Kandinsky5T2IPipeline": {},
    },
)
