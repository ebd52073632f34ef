"""Tiny pipelines of several families, LoRA files for them, and a stand-in for the engine."""

import contextlib
import itertools
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bentoml_diffusers import testing

CALL = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}


def _clip(tokenizer, cls, width=16, **more):
    from transformers import CLIPTextConfig

    end = tokenizer.eos_token_id
    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=24,
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=end,
            **more,
        )
    )


def _t5(tokenizer, width=16):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    ).eval()


def _vae(channels=4):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=32,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def tiny_sd():
    return testing.tiny_stable_diffusion()


def tiny_sdxl():
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    one, two = testing.tiny_tokenizer(), testing.tiny_tokenizer()
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip(one, CLIPTextModel),
        text_encoder_2=_clip(two, CLIPTextModelWithProjection, width=24, projection_dim=20),
        tokenizer=one,
        tokenizer_2=two,
        unet=UNet2DConditionModel(
            sample_size=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=8 * 6 + 20,
            cross_attention_dim=40,
            norm_num_groups=4,
        ),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def tiny_flux():
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    one, two = testing.tiny_tokenizer(), testing.tiny_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(),
        text_encoder=_clip(one, CLIPTextModel),
        tokenizer=one,
        text_encoder_2=_t5(two),
        tokenizer_2=two,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        ).eval(),
    )


def tiny_sd3():
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(0)
    one, two, three = (testing.tiny_tokenizer() for _ in range(3))
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=4,
            patch_size=1,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=40,
            caption_projection_dim=32,
            pooled_projection_dim=40,
            out_channels=4,
            pos_embed_max_size=16,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(),
        text_encoder=_clip(one, CLIPTextModelWithProjection, projection_dim=16),
        tokenizer=one,
        text_encoder_2=_clip(two, CLIPTextModelWithProjection, width=24, projection_dim=24),
        tokenizer_2=two,
        text_encoder_3=_t5(three, width=40),
        tokenizer_3=three,
    )


def tiny_pixart():
    from diffusers import (
        DPMSolverMultistepScheduler,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )

    torch.manual_seed(0)
    tokenizer = testing.tiny_tokenizer()
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=_t5(tokenizer),
        vae=_vae(),
        transformer=PixArtTransformer2DModel(
            sample_size=4,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=16,
            in_channels=4,
            cross_attention_dim=24,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            use_additional_conditions=False,
        ).eval(),
        scheduler=DPMSolverMultistepScheduler(),
    )


FAMILIES = {
    "sd": (tiny_sd, {"guidance_scale": 3.0}),
    "sdxl": (tiny_sdxl, {"guidance_scale": 3.0}),
    "flux": (tiny_flux, {"guidance_scale": 0.0, "max_sequence_length": 24}),
    "sd3": (tiny_sd3, {"guidance_scale": 3.0, "max_sequence_length": 24}),
    "pixart": (
        tiny_pixart,
        {
            "guidance_scale": 3.0,
            "max_sequence_length": 24,
            "clean_caption": False,
            "use_resolution_binning": False,
        },
    ),
}

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]


def save_lora(path, make, targets, *, seed=1, strength=0.3, metadata=False, **config):
    """Writes a random LoRA as diffusers saves one; ``targets`` are layers by component."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = make()
    layers, about = {}, {}
    for component, names in targets.items():
        module = getattr(pipeline, component)
        given = {"r": 4, "lora_alpha": 4, "target_modules": names, **config}
        module.add_adapter(LoraConfig(**given))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for key, parameter in module.named_parameters():
                if "lora_" in key and "magnitude" not in key:
                    parameter.normal_(0, strength)
                elif "lora_magnitude" in key:
                    parameter.mul_(1.5)
        layers[f"{component}_lora_layers"] = get_peft_model_state_dict(module)
        if metadata:
            about[f"{component}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
    pipeline.save_lora_weights(path.parent, **layers, **about, weight_name=path.name)
    return path


def save_kohya_lora(path, make, layers, *, rank=4, alpha=2.0, seed=1, strength=0.3):
    """Writes a random LoRA as kohya's trainer does; ``layers`` are paths by component."""
    pipeline = make()
    prefixes = {
        "unet": "lora_unet",
        "text_encoder": "lora_te_text_model",
        "transformer": "lora_unet",
    }
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for component, names in layers.items():
        for name in names:
            weight = getattr(pipeline, component).get_submodule(name).weight
            key = f"{prefixes[component]}_{name.replace('.', '_')}"
            down = (rank, *weight.shape[1:])
            up = (weight.shape[0], rank, *[1] * (weight.ndim - 2))
            tensors[f"{key}.lora_down.weight"] = torch.randn(down, generator=random) * strength
            tensors[f"{key}.lora_up.weight"] = torch.randn(up, generator=random) * strength
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def edit(path, change, to=None):
    """Writes a file again, its tensors changed."""
    tensors = load_file(path)
    save_file(change(tensors), to or path)
    return to or path


def paint(pipeline, seed=7, prompt="a red circle", **call):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return torch.as_tensor(pipeline(prompt, generator=generator, **{**CALL, **call}).images)


def paint_by_peft(make, loras, **call):
    """The picture that diffusers and PEFT paint; ``loras`` are files and scales."""
    pipeline = make()
    names = [f"adapter{index}" for index in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        pipeline.load_lora_weights(str(path), adapter_name=name)
    if names:
        pipeline.set_adapters(names, [scale for _, scale in loras])
    return paint(pipeline, **call)


def paint_alone(pipeline, bank, lora_weights=None, textual_inversions=None, **call):
    """One request, as the engine runs it when nothing else is there."""
    prepared = bank.prepare(bank.find(lora_weights, textual_inversions, call))
    lease = bank.acquire(prepared)
    try:
        with view_of(pipeline, lease) as view, collected(pipeline, bank, [lease]):
            return paint(view, **call)
    finally:
        lease.release()


@contextlib.contextmanager
def view_of(pipeline, lease):
    import copy

    view = copy.copy(pipeline)
    view.scheduler = copy.deepcopy(pipeline.scheduler)
    for name, component in lease.components.items():
        setattr(view, name, component)
    with lease.applied() if lease.exclusive else contextlib.nullcontext():
        yield view


@contextlib.contextmanager
def collected(pipeline, bank, leases):
    """Stands for the engine: every forward of a component is a joint one of ``leases``.

    The pipelines put negative before positive prompts, so with guidance each lease comes twice.
    """
    modules = {
        name: part
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
    }

    def collector(name, forward):
        def run(*args, **kwargs):
            tensors = itertools.chain(args, kwargs.values())
            rows = len(next(one for one in tensors if isinstance(one, torch.Tensor) and one.ndim))
            shares = [(lease, 1) for lease in leases] * (rows // len(leases))
            with bank.forwarding(name, shares if len(leases) > 1 else [(leases[0], None)]):
                return forward(*args, **kwargs)

        return run

    for name, module in modules.items():
        module.forward = collector(name, module.forward)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def paint_together(pipeline, bank, leases, seeds, prompts, **call):
    """Requests in one batch; returns their pictures."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pipeline.set_progress_bar_config(disable=True)
    with collected(pipeline, bank, leases):
        result = pipeline(prompts, generator=generators, **{**CALL, **call})
    return torch.as_tensor(result.images)


def names_of(folder):
    return sorted(path.name for path in Path(folder).glob("*.safetensors"))
