"""CogVideoX."""

from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel, DDIMScheduler

from bentoml_diffusers import testing
from bentoml_diffusers.testing.text import tiny_t5
from families.family import IMAGE, VIDEO, Family, Variant, config_of


def make():
    tokenizer = testing.tiny_t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": tiny_t5(tokenizer, width=32),
        "vae": AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(4, 4, 4, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            sample_height=32,
            sample_width=32,
        ),
        "transformer": CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=32,
            num_layers=1,
            sample_width=4,
            sample_height=4,
            sample_frames=9,
            max_text_seq_length=16,
        ),
        "scheduler": DDIMScheduler(),
    }


def image(known):
    config = config_of(
        known["transformer"],
        in_channels=8,
        attention_head_dim=16,
        use_rotary_positional_embeddings=True,
    )
    return {"transformer": CogVideoXTransformer3DModel(**config)}


FAMILY = Family(
    "CogVideoX",
    make=make,
    arguments={"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16},
    classes={
        "CogVideoXPipeline": {},
        "CogVideoXImageToVideoPipeline": Variant({"image": IMAGE}, image),
        "CogVideoXVideoToVideoPipeline": {"video": VIDEO, "num_frames": None},
    },
)
