"""The predictor sampler of the variance-preserving SDE, which no release of diffusers has.

Song, Sohl-Dickstein, Kingma, Kumar, Ermon and Poole, "Score-Based Generative Modeling through
Stochastic Differential Equations" (ICLR 2021, arXiv:2011.13456), section 4.3 and appendix C.
"""

from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.schedulers import ScoreSdeVpScheduler
from diffusers.utils.torch_utils import randn_tensor


class ScoreSdeVpPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Unconditional images from a score network of a variance-preserving SDE.

    The network gets the time as ``t * time_scale`` and returns the noise; the scheduler turns it
    into the score and takes one Euler-Maruyama step of the reverse SDE from ``t`` = 1 to its
    ``sampling_eps``. The last step's mean, without its noise, is the image.

    Args:
        unet: Denoiser for images in [-1, 1].
        scheduler: Scheduler with the ``beta_min`` and ``beta_max`` of the training.
        time_scale: Factor that the network was trained with; 999 in the paper's code.
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self, unet: UNet2DModel, scheduler: ScoreSdeVpScheduler, time_scale: float = 999.0
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(time_scale=time_scale)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 1000,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Generates images.

        Args:
            batch_size: Number of images.
            num_inference_steps: Steps of the reverse SDE, from 1; the paper has 1000.
            generator: Source of the noise: one generator, or one per image.
            latents: Noise to start from, standard normal, of shape (batch_size, channels,
                height, width).
            output_type: ``"pil"``, or ``"np"`` for floats in [0, 1] of shape (batch_size,
                height, width, channels).
            return_dict: ``False`` gives a tuple.
        """
        sample = self._start(batch_size, generator, latents)
        mean = sample
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        for time in self.progress_bar(self.scheduler.timesteps):
            times = time * torch.ones(sample.shape[0], device=self.device)
            noise = self.unet(sample, times * self.config.time_scale).sample
            sample, mean = self.scheduler.step_pred(noise, sample, times, generator=generator)
        images = (mean / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy()
        result = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def _start(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, self.unet.config.in_channels, height, width)
        if latents is None:
            start: torch.Tensor = randn_tensor(
                shape, generator=generator, device=self.device, dtype=self.unet.dtype
            )
            return start
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents: got shape {tuple(latents.shape)}, expected {shape}")
        return latents.to(device=self.device, dtype=self.unet.dtype)
