"""What `engine_http.py` compares with: plain diffusers behind BentoML, one request at a time.

`way` of a request is ``upstream`` (load the LoRAs' files, call, unload: what ``bentoml.diffusers``
would do if its LoRA worked) or ``plain`` (all LoRAs resident, ``set_adapters`` before each call).
"""

from __future__ import annotations

import threading
from typing import Any

import bentoml
import torch
from PIL.Image import Image  # noqa: TC002 - BentoML reads the annotations of an API

import bentoml_diffusers
from bentoml_diffusers.demo import LORAS, MODEL_NAME


@bentoml.service(name="plain", traffic={"timeout": 600})
class PlainService:
    """One pipeline for each way, and a lock."""

    def __init__(self) -> None:
        bentoml_diffusers.import_demo_models()
        self.lock = threading.Lock()
        self.upstream, self.plain = (bentoml_diffusers.load_model(MODEL_NAME) for _ in range(2))
        for pipeline in (self.upstream, self.plain):
            pipeline.set_progress_bar_config(disable=True)
        for name, path in LORAS.items():
            self.plain.load_lora_weights(str(path), adapter_name=name)

    @bentoml.api
    def txt2img(
        self,
        way: str,
        prompt: str,
        num_inference_steps: int,
        guidance_scale: float,
        seed: int,
        lora_weights: list[dict[str, Any]] | None = None,
    ) -> Image:
        """Generates one image after the other."""
        scales = {one["name"]: one.get("scale", 1.0) for one in lora_weights or ()}
        call = {
            "prompt": prompt,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
        }
        with self.lock:
            generate = self._generate_upstream if way == "upstream" else self._generate_plain
            return generate(scales, {**call, "generator": torch.Generator().manual_seed(seed)})

    def _generate_upstream(self, scales: dict[str, float], call: dict[str, Any]) -> Image:
        for name in scales:
            self.upstream.load_lora_weights(str(LORAS[name]), adapter_name=name)
        if scales:
            self.upstream.set_adapters(list(scales), list(scales.values()))
        image: Image = self.upstream(**call).images[0]
        if scales:
            self.upstream.unload_lora_weights()
        return image

    def _generate_plain(self, scales: dict[str, float], call: dict[str, Any]) -> Image:
        if scales:
            self.plain.enable_lora()
            self.plain.set_adapters(list(scales), list(scales.values()))
        else:
            self.plain.disable_lora()
        image: Image = self.plain(**call).images[0]
        return image
