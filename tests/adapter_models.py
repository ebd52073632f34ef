"""Tiny pipelines of several families, LoRA files for them, and a stand-in for the engine."""

import contextlib
import itertools
from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file, save_file

from bentoml_diffusers import testing
from bentoml_diffusers.testing.text import tiny_t5, tiny_t5_tokenizer
from bentoml_diffusers.testing.unets import tiny_vae

CALL = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}


def tiny_wan(two=True):
    """Wan 2.2, whose second denoiser runs the last steps; ``two=False``: Wan 2.1."""

    def denoiser(seed):
        torch.manual_seed(seed)
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = tiny_t5_tokenizer()
        return diffusers.WanPipeline(
            tokenizer=tokenizer,
            text_encoder=tiny_t5(tokenizer, width=32),
            vae=diffusers.AutoencoderKLWan(
                base_dim=3,
                z_dim=16,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[False, True, True],
            ),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
            transformer=denoiser(1),
            transformer_2=denoiser(2) if two else None,
            boundary_ratio=0.875 if two else None,
        )


def tiny_z_image():
    """Z-Image without a text encoder: calls bring the embeddings of their prompt."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[64, 32, 32],
        )
        for parameter in transformer.parameters():
            if parameter.ndim > 1:  # some are not initialized
                torch.nn.init.normal_(parameter, std=0.1)
        return diffusers.ZImagePipeline(
            transformer=transformer,
            vae=tiny_vae(shift=0.1),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            text_encoder=None,
            tokenizer=None,
        )


FAMILIES = {
    "sd": (testing.tiny_stable_diffusion, {"guidance_scale": 3.0}),
    "sdxl": (testing.tiny_stable_diffusion_xl, {"guidance_scale": 3.0}),
    "flux": (testing.tiny_flux, {"guidance_scale": 0.0, "max_sequence_length": 24}),
    "sd3": (testing.tiny_stable_diffusion_3, {"guidance_scale": 3.0, "max_sequence_length": 24}),
    "pixart": (
        testing.tiny_pixart_sigma,
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


def generate(pipeline, seed=7, prompt="a red circle", **call):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return torch.as_tensor(pipeline(prompt, generator=generator, **{**CALL, **call})[0])


def generate_by_peft(make, loras, **call):
    """The image that diffusers and PEFT generate; ``loras`` are files, scales and arguments."""
    pipeline = make()
    names = [f"adapter{index}" for index in range(len(loras))]
    for name, (path, _, *arguments) in zip(names, loras, strict=True):
        pipeline.load_lora_weights(str(path), adapter_name=name, **dict(*arguments))
    if names:
        pipeline.set_adapters(names, [scale for _, scale, *_ in loras])
    return generate(pipeline, **call)


def generate_alone(pipeline, bank, lora_weights=None, textual_inversions=None, **call):
    """One request, as the engine runs it when nothing else is there."""
    prepared = bank.prepare(bank.find(lora_weights, textual_inversions, call))
    lease = bank.acquire(prepared)
    try:
        with view_of(pipeline, lease) as view, collected(pipeline, bank, [lease]):
            return generate(view, **call)
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


def generate_together(pipeline, bank, leases, seeds, prompts, **call):
    """Requests in one batch; returns their images."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pipeline.set_progress_bar_config(disable=True)
    with collected(pipeline, bank, leases):
        result = pipeline(prompts, generator=generators, **{**CALL, **call})
    return torch.as_tensor(result.images)


def names_of(folder):
    return sorted(path.name for path in Path(folder).glob("*.safetensors"))
