"""Kandinsky 3."""

from diffusers import DDPMScheduler, Kandinsky3UNet, VQModel

from bentoml_diffusers import testing
from bentoml_diffusers.testing.text import tiny_t5
from families import stable_diffusion as sd
from families.family import Family


def make():
    tokenizer = testing.tiny_t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": tiny_t5(tokenizer),
        "unet": Kandinsky3UNet(
            in_channels=4,
            time_embedding_dim=8,
            groups=2,
            attention_head_dim=4,
            layers_per_block=2,
            block_out_channels=(8, 16),
            cross_attention_dim=16,
            encoder_hid_dim=16,
        ),
        "movq": VQModel(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            num_vq_embeddings=12,
            vq_embed_dim=4,
        ),
        "scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False),
    }


FAMILY = Family(
    "Kandinsky 3",
    make=make,
    without={"lora": "its UNet takes no adapters"},
    classes={
        "Kandinsky3Pipeline": {"height": 32, "width": 32},
        "Kandinsky3Img2ImgPipeline": sd.IMG2IMG,
    },
)
