"""Differential diffusion as blocks of Stable Diffusion XL, for diffusers 0.42.

A map says for each pixel how much of the input image stays: white keeps it, black repaints
it, grey repaints the later, finer steps only. Before each step, latents whose map is still above
the step's threshold are replaced by the input's latents, noised to that step.

"Differential Diffusion: Giving Each Pixel Its Strength", Levin and Fried 2023, arXiv 2306.00950;
diffusers' developer guide has the same with blocks of an older version.
"""

import PIL.Image
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.image_processor import VaeImageProcessor
from diffusers.modular_pipelines import (
    AutoPipelineBlocks,
    ComponentSpec,
    ConditionalPipelineBlocks,
    InputParam,
    ModularPipelineBlocks,
    OutputParam,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import (
    StableDiffusionXLControlNetInputStep,
    StableDiffusionXLInputStep,
    StableDiffusionXLPrepareAdditionalConditioningStep,
    StableDiffusionXLSetTimestepsStep,
)
from diffusers.modular_pipelines.stable_diffusion_xl.decoders import StableDiffusionXLDecodeStep
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import (
    StableDiffusionXLControlNetDenoiseStep,
    StableDiffusionXLControlNetLoopDenoiser,
    StableDiffusionXLDenoiseLoopWrapper,
    StableDiffusionXLDenoiseStep,
    StableDiffusionXLLoopAfterDenoiser,
    StableDiffusionXLLoopDenoiser,
)
from diffusers.modular_pipelines.stable_diffusion_xl.encoders import (
    StableDiffusionXLTextEncoderStep,
    StableDiffusionXLVaeEncoderStep,
)
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLAutoIPAdapterStep,
    StableDiffusionXLBeforeDenoiseStep,
    StableDiffusionXLImg2ImgBeforeDenoiseStep,
)
from diffusers.schedulers import EulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

MAP = InputParam(
    "diffdiff_map",
    type_hint=PIL.Image.Image,
    required=True,
    description="How much of the image stays: white keeps it, black generates it anew.",
)


def latent_input(name: str, description: str) -> InputParam:
    """A value that another block makes."""
    return InputParam(name, type_hint=torch.Tensor, required=True, description=description)


class DifferentialPrepareLatentsStep(ModularPipelineBlocks):
    """Begins with the input's latents, noised; keeps them, the noise and the map for the loop."""

    model_name = "stable-diffusion-xl"

    @property
    def description(self):
        return "Prepares the latents, the noise and the map of differential diffusion."

    @property
    def expected_components(self):
        mask_config = {"vae_scale_factor": 1, "do_normalize": False, "do_convert_grayscale": True}
        return [
            ComponentSpec("scheduler", EulerDiscreteScheduler),
            ComponentSpec(
                "mask_processor",
                VaeImageProcessor,
                config=FrozenDict(mask_config),
                default_creation_method="from_config",
            ),
        ]

    @property
    def inputs(self):
        return [
            MAP,
            InputParam("generator"),
            InputParam("num_images_per_prompt", default=1),
            InputParam("batch_size", type_hint=int, required=True),
            latent_input("image_latents", "The input's latents, of the step vae_encoder."),
            latent_input("timesteps", "Of the step set_timesteps."),
        ]

    @property
    def intermediate_outputs(self):
        return [
            OutputParam("latents", type_hint=torch.Tensor),
            OutputParam("noise", type_hint=torch.Tensor),
            OutputParam("image_latents", type_hint=torch.Tensor),
            OutputParam("change_map", type_hint=torch.Tensor),
        ]

    @torch.no_grad()
    def __call__(self, components, state):
        block = self.get_block_state(state)
        count = block.batch_size * block.num_images_per_prompt
        image = block.image_latents
        block.image_latents = image.repeat(count // image.shape[0], 1, 1, 1)
        block.noise = randn_tensor(
            block.image_latents.shape,
            generator=block.generator,
            device=image.device,
            dtype=image.dtype,
        )
        first = block.timesteps[:1].repeat(count)
        block.latents = components.scheduler.add_noise(block.image_latents, block.noise, first)
        height, width = image.shape[-2:]
        change_map = components.mask_processor.preprocess(
            block.diffdiff_map, height=height, width=width
        )
        block.change_map = change_map.to(device=image.device, dtype=image.dtype)
        self.set_block_state(state, block)
        return components, state


class DifferentialLoopBeforeDenoiser(ModularPipelineBlocks):
    """Puts the input back where the map is above the threshold of this step."""

    model_name = "stable-diffusion-xl"

    @property
    def description(self):
        return "Step within the denoising loop that keeps what the map keeps."

    @property
    def expected_components(self):
        return [ComponentSpec("scheduler", EulerDiscreteScheduler)]

    @property
    def inputs(self):
        return [
            latent_input("latents", "Of the step prepare_latents."),
            latent_input("noise", "Of the step prepare_latents."),
            latent_input("image_latents", "Of the step prepare_latents."),
            latent_input("change_map", "Of the step prepare_latents."),
            latent_input("timesteps", "Of the step set_timesteps."),
        ]

    @torch.no_grad()
    def __call__(self, components, block_state, i, t):
        kept = components.scheduler.add_noise(
            block_state.image_latents, block_state.noise, t.reshape(1)
        )
        threshold = i / len(block_state.timesteps)
        mask = (block_state.change_map > threshold).to(kept.dtype)
        block_state.latents = kept * mask + block_state.latents * (1 - mask)
        block_state.scaled_latents = components.scheduler.scale_model_input(block_state.latents, t)
        return components, block_state


class DifferentialDenoiseStep(StableDiffusionXLDenoiseLoopWrapper):
    """The denoising loop of differential diffusion."""

    block_classes = [
        DifferentialLoopBeforeDenoiser,
        StableDiffusionXLLoopDenoiser,
        StableDiffusionXLLoopAfterDenoiser,
    ]
    block_names = ["before_denoiser", "denoiser", "after_denoiser"]


class DifferentialControlNetDenoiseStep(StableDiffusionXLDenoiseLoopWrapper):
    """The same with a ControlNet."""

    block_classes = [
        DifferentialLoopBeforeDenoiser,
        StableDiffusionXLControlNetLoopDenoiser,
        StableDiffusionXLLoopAfterDenoiser,
    ]
    block_names = ["before_denoiser", "denoiser", "after_denoiser"]


class AutoVaeEncoderStep(AutoPipelineBlocks):
    """Encodes the image if there is one."""

    block_classes = [StableDiffusionXLVaeEncoderStep]
    block_names = ["vae_encoder"]
    block_trigger_inputs = ["image"]


class AutoControlNetInputStep(AutoPipelineBlocks):
    """Prepares the image for the ControlNet if there is one."""

    block_classes = [StableDiffusionXLControlNetInputStep]
    block_names = ["controlnet_input"]
    block_trigger_inputs = ["control_image"]


class DifferentialBeforeDenoiseStep(SequentialPipelineBlocks):
    """All steps are done, as in text2image: the map says how much each pixel changes."""

    block_classes = [
        StableDiffusionXLSetTimestepsStep,
        DifferentialPrepareLatentsStep,
        StableDiffusionXLPrepareAdditionalConditioningStep,
    ]
    block_names = ["set_timesteps", "prepare_latents", "prepare_add_cond"]


class AutoBeforeDenoiseStep(AutoPipelineBlocks):
    """With a map differential diffusion, else as before: image2image or text2image."""

    block_classes = [
        DifferentialBeforeDenoiseStep,
        StableDiffusionXLImg2ImgBeforeDenoiseStep,
        StableDiffusionXLBeforeDenoiseStep,
    ]
    block_names = ["differential", "image2image", "text2image"]
    block_trigger_inputs = ["diffdiff_map", "image_latents", None]


class AutoDenoiseStep(ConditionalPipelineBlocks):
    """With or without a map, with or without a ControlNet."""

    block_classes = [
        StableDiffusionXLDenoiseStep,
        StableDiffusionXLControlNetDenoiseStep,
        DifferentialDenoiseStep,
        DifferentialControlNetDenoiseStep,
    ]
    block_names = ["denoise", "controlnet", "differential", "differential_controlnet"]
    block_trigger_inputs = ["diffdiff_map", "controlnet_cond"]
    default_block_name = "denoise"

    def select_block(self, diffdiff_map=None, controlnet_cond=None):
        if diffdiff_map is None:
            return None if controlnet_cond is None else "controlnet"
        return "differential" if controlnet_cond is None else "differential_controlnet"


def list_workflows():
    """Each task alone, with a ControlNet, with an IP-Adapter, with both: what triggers it."""
    tasks = {
        "text2image": {"prompt": True},
        "image2image": {"image": True, "prompt": True},
        "differential": {"image": True, "diffdiff_map": True, "prompt": True},
    }
    control, adapter = {"control_image": True}, {"ip_adapter_image": True}
    companions = {
        "": {},
        "controlnet_": control,
        "ip_adapter_": adapter,
        "ip_adapter_controlnet_": {**adapter, **control},
    }
    return {
        f"{prefix}{name}": {**more, **triggers}
        for prefix, more in companions.items()
        for name, triggers in tasks.items()
    }


class DifferentialDiffusionBlocks(SequentialPipelineBlocks):
    """Text or image to image, and differential diffusion, with ControlNet and IP-Adapter."""

    block_classes = [
        StableDiffusionXLTextEncoderStep,
        StableDiffusionXLAutoIPAdapterStep,
        AutoVaeEncoderStep,
        StableDiffusionXLInputStep,
        AutoBeforeDenoiseStep,
        AutoControlNetInputStep,
        AutoDenoiseStep,
        StableDiffusionXLDecodeStep,
    ]
    block_names = [
        "text_encoder",
        "ip_adapter",
        "vae_encoder",
        "input",
        "before_denoise",
        "controlnet_input",
        "denoise",
        "decode",
    ]
    _workflow_map = list_workflows()

    @property
    def description(self):
        return "Text or image to image, and differential diffusion, with Stable Diffusion XL."

    @property
    def outputs(self):
        return [OutputParam.template("images")]
