"""A small LoRA file in each layout that diffusers reads, with the layers as trainers name them."""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from diffusers import __version__ as diffusers_version
from diffusers.loaders import lora_pipeline
from packaging.version import Version

from bentoml_diffusers import testing
from bentoml_diffusers.adapters.lycoris import original_name

PEFT = ("lora_A.weight", "lora_B.weight")
PEFT_ALPHA = (*PEFT, "alpha")
KOHYA = ("lora_down.weight", "lora_up.weight", "alpha")
DOTTED = ("lora.down.weight", "lora.up.weight", "alpha")
NAMED = ("lora_A.default.weight", "lora_B.default.weight")
XLABS = ("down.weight", "up.weight")
LOKR = ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha")
WHOLE_LOKR = ("lokr_w1", "lokr_w2", "alpha")
INPUTS, OUTPUTS, RANK = 8, 12, 4


@dataclass(frozen=True)
class Layout:
    """A file in one layout.

    Attributes:
        name: Of the test.
        loader: The mixin of diffusers that reads it, without ``LoraLoaderMixin``.
        converters: The functions of diffusers that are called for it, without what all are called.
        layers: Names of its layers: ``{a,b}`` for each of these, ``> 99`` for so many outputs.
        ends: What follows the name of a layer, by which its tensors are made.
        prefix: What stands before each name.
        flat: Dots in names are underscores.
        more: Names of layers that are for a text encoder, with their own prefix.
        about: Metadata of the file.
        real: Makes the pipeline, where its names cannot be made of the file's; its layers are used.
        rename: What the file calls a layer of the real pipeline.
        since: The version of diffusers that first reads it; 0.41 is the last one for Python 3.10.
    """

    name: str
    loader: str
    converters: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    ends: tuple[str, ...] = PEFT
    prefix: str = ""
    flat: bool = False
    text: tuple[str, ...] = ()
    about: dict[str, str] = field(default_factory=dict)
    real: Callable | None = None
    rename: Callable = str
    since: str = "0.41"

    @property
    def mixin(self):
        return getattr(lora_pipeline, f"{self.loader}LoraLoaderMixin")

    def tensors(self):
        """Makes the tensors of the file."""
        random, made = torch.Generator().manual_seed(1), {}
        for layer, (inputs, outputs) in self._sizes().items():
            for end in self.ends:
                tensor = torch.randn(shape_of(end, inputs, outputs), generator=random)
                made[f"{layer}.{end}"] = torch.tensor(2.0) if end == "alpha" else tensor * 0.3
        return made

    def _sizes(self):
        if self.real is not None:
            return kohya_names(self.real(), self.rename)
        sizes = {}
        for pattern in self.layers:
            names, _, outputs = pattern.partition(" > ")
            for name in expand(names):
                name = name.replace(".", "_") if self.flat else name
                sizes[self.prefix + name] = ([INPUTS], int(outputs or OUTPUTS))
        width = testing.tiny_flux().text_encoder.config.hidden_size if self.text else 0
        text = [name for pattern in self.text for name in expand(pattern)]
        return {**sizes, **dict.fromkeys(text, ([width], width))}


def expand(pattern):
    """Returns the names that a pattern stands for."""
    parts = re.split(r"\{([^}]*)\}", pattern)
    parts = [part.split(",") if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*parts)]


def shape_of(end, inputs, outputs):
    """Returns the shape of one tensor of a layer; ``inputs`` are channels and the kernel."""
    ranks = {"lokr_w2_a": (outputs // 2, 1), "lokr_w2_b": (1, inputs[0] // 2)}
    whole = {"lokr_w1": (2, 2), "lokr_w2": (outputs // 2, inputs[0] // 2), "alpha": ()}
    if end in ranks or end in whole:
        return {**ranks, **whole}[end]
    if "lora_A" in end or "down" in end:
        return (RANK, *inputs)
    return (outputs, RANK, *[1] * (len(inputs) - 1))


def kohya_names(pipeline, rename):
    """Returns the sizes of all layers of a real UNet and its text encoders, by kohya's names."""
    sizes = {}
    for path, module in pipeline.unet.named_modules():
        # Of the names of diffusers, those of SDXL's added embedding are lost in its converter.
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and "add_emb" not in rename(path):
            outputs, *inputs = module.weight.shape
            sizes[f"lora_unet_{rename(path).replace('.', '_')}"] = (inputs, outputs)
    second = hasattr(pipeline, "text_encoder_2")
    for component in ("text_encoder", "text_encoder_2")[: 1 + second]:
        short = {"text_encoder_2": "te2"}.get(component, "te1" if second else "te")
        for path, module in getattr(pipeline, component).named_modules():
            if path.endswith(("_proj", "fc1", "fc2")):
                outputs, *inputs = module.weight.shape
                name = path.removeprefix("text_model.").replace(".", "_")
                sizes[f"lora_{short}_text_model_{name}"] = (inputs, outputs)
    return sizes


def by_stability(path):
    """Returns the name in Stability's code, for one layer per block."""
    return original_name(path, 1)


# q, k, v and the MLP of Flux: converters divide them by fixed numbers.
FUSED = "> 21504"
BFL = (
    "double_blocks.{0,1}.{img,txt}_{attn.qkv,attn.proj,mlp.0,mlp.2,mod.lin}",
    f"single_blocks.{{0,1}}.linear1 {FUSED}",
    "single_blocks.{0,1}.{linear2,modulation.lin}",
)
BFL_ALL = tuple(
    pattern.replace(
        "double_blocks.{0,1}", f"double_blocks.{{{','.join(map(str, range(19)))}}}"
    ).replace("single_blocks.{0,1}", f"single_blocks.{{{','.join(map(str, range(38)))}}}")
    for pattern in BFL
)
CLIP = "text_model_encoder_layers_{0,1}_self_attn_{q,out}_proj"
FLUX = (
    "transformer_blocks.{0,1}.attn.{to_q,to_k,to_out.0,add_v_proj}",
    "single_transformer_blocks.0.{proj_mlp,proj_out,attn.to_v}",
)
FLUX2 = (
    "double_blocks.{0,1}.{img,txt}_{attn.qkv,attn.proj,mlp.0,mlp.2}",
    "single_blocks.{0,1}.{linear1,linear2}",
    "{img,txt}_in",
    "time_in.{in,out}_layer",
    "final_layer.linear",
)
FLUX2_LOKR = ("double_blocks.{0,1}.{img,txt}_{attn.proj,mlp.0,mlp.2}", *FLUX2[1:])
FLUX2_MORE = ("final_layer.adaLN_modulation.1", "double_stream_modulation_{img,txt}.lin")
FLUX2_OWN = (
    "transformer_blocks.{0,1}.attn.{to_q,to_k,to_out.0,add_q_proj,to_add_out}",
    "transformer_blocks.{0,1}.{ff.linear_in,ff_context.linear_out}",
    "single_transformer_blocks.{0,1}.attn.{to_qkv_mlp_proj,to_out}",
)
WAN = ("blocks.{0,1}.{self_attn.,cross_attn.}{q,k,v,o}", "blocks.{0,1}.ffn.{0,2}")
WAN_REST = ("time_projection.1", "head.head", "{text,time}_embedding.{0,2}")
WAN_IMAGE = ("blocks.{0,1}.cross_attn.{k,v}_img",)
QWEN = (
    "transformer_blocks.{0,1}.attn.{to_q,to_k,to_v,to_out.0,add_q_proj,to_add_out}",
    "transformer_blocks.{0,1}.{img_mlp.net.0.proj,txt_mlp.net.2,img_mod.1,txt_mod.1}",
)
Z_IMAGE = (
    "{layers.0,layers.1,noise_refiner.0,context_refiner.0}.attention.{to_q,to_k,to_v,to_out.0}",
    "{layers.0,layers.1,noise_refiner.0}.feed_forward.{w1,w2,w3}",
    "{layers.0,layers.1,noise_refiner.0}.adaLN_modulation.0",
)
Z_FUSED = ("layers.{0,1}.attention.{qkv,out}", "layers.{0,1}.feed_forward.{w1,w2,w3}")
Z_TWICE = ("layers.{0,1}.attention.{to.q,to.k,to.v,to_out.0}",)
LUMINA = (
    "{noise_refiner,context_refiner,layers}.0.attention.qkv > 3840",
    "{noise_refiner,context_refiner,layers}.0.{attention.out,feed_forward.w1,feed_forward.w2}",
    "{noise_refiner,context_refiner,layers}.0.feed_forward.w3",
    "{noise_refiner,layers}.0.adaLN_modulation.1",
)
HUNYUAN = (
    "double_blocks.{0,1}.{img,txt}_{attn_qkv,attn_proj,mod.linear,mlp.fc1,mlp.fc2}",
    f"single_blocks.{{0,1}}.linear1 {FUSED}",
    "single_blocks.{0,1}.{linear2,modulation.linear}",
    "{img_in.proj,time_in.mlp.0,vector_in.in_layer,guidance_in.mlp.2,final_layer.linear}",
    "final_layer.adaLN_modulation.1",
    "txt_in.{input_embedder,t_embedder.mlp.0,c_embedder.linear_1}",
)
MINIMAX = (
    "{blocks.0,blocks.1,token_refiner.blocks.0}.{attn.qkv_proj,attn.out_proj} > 768",
    "{blocks.0,blocks.1,token_refiner.blocks.0}.mlp.{fc1,fc2}",
    "{blocks.0,blocks.1,final_layer}.adaln_proj.linear",
    "{video_patch_proj,condition_proj,time_embedder.proj_in,final_layer.video_out}",
)
KREA = (
    "blocks.{0,1}.{attn.wq,attn.wk,attn.wv,attn.wo,attn.gate,mlp.gate,mlp.up,mlp.down}",
    "txtfusion.{layerwise,refiner}_blocks.0.{attn.wq,mlp.up}",
    "{first,last.linear,tmlp.0,tproj.1,txtmlp.3,txtfusion.projector}",
)
ANIMA = (
    "blocks.{0,1}.{self_attn.q_proj,cross_attn.output_proj,mlp.layer1,adaln_modulation_mlp.1}",
    "{llm_adapter.blocks.0.self_attn.q_proj,final_layer.linear,x_embedder.proj.1,t_embedder.1}",
)
LTX2 = (
    "transformer_blocks.0.{attn1.to_q,audio_attn1.to_k,ff.net.0.proj}",
    "{patchify_proj,audio_patchify_proj,adaln_single.linear,audio_adaln_single.linear}",
    "av_ca_video_scale_shift_adaln_single.linear",
)
ACE = ("layers.{0,1}.{self,cross}_attn.{q,k,v,o}_proj",)
IDEOGRAM = ("layers.{0,1}.{attention.qkv,attention.o,feed_forward.w1,adaln_modulation}",)
FLUX3 = (
    "content_mode_blocks.{0,1}.{q_proj,k_proj,attn_out,mlp_in}",
    "single_blocks.0.{v_proj,mlp_out}",
)
PLAIN = ("blocks.{0,1}.{attn.to_q,attn.to_out.0,ff.net.0.proj}",)
# Classes whose loader takes the names of diffusers only.
OWN_NAMES = ("SD3", "AuraFlow", "CogVideoX", "Mochi1", "Sana", "Kandinsky", "CogView4")
OWN_NAMES += ("Cosmos",)
NEW_NAMES = ("BriaFibo2", "RFD4Proteina")

_SGM, _KOHYA_UNET = "_maybe_map_sgm_blocks_to_diffusers", "non_diffusers_lora"
_DM, _TR, _PM = "diffusion_model.", "transformer.", "base_model.model."

_LOKR = [
    Layout("z-image-lokr", "ZImage", ("non_diffusers_lokr",), Z_IMAGE, LOKR, _DM),
    Layout("z-image-whole-lokr", "ZImage", ("non_diffusers_lokr",), Z_IMAGE, WHOLE_LOKR, _DM),
    Layout("flux2-lokr", "Flux2", ("non_diffusers_lokr",), FLUX2_OWN, LOKR),
    Layout(
        "flux2-lycoris", "Flux2", ("lycoris_flux2_lokr",), FLUX2_OWN, LOKR, "lycoris_", flat=True
    ),
    Layout("flux2-lokr-bfl", "Flux2", ("non_diffusers_flux2_lokr",), FLUX2_LOKR, LOKR, _DM),
]

_ALL = [
    *(Layout(name, name, layers=PLAIN, prefix=_TR) for name in OWN_NAMES),
    *(Layout(name, name, layers=PLAIN, prefix=_TR, since="0.42") for name in NEW_NAMES),
    Layout(
        "sd-kohya",
        "StableDiffusion",
        (_KOHYA_UNET,),
        ends=KOHYA,
        real=testing.tiny_stable_diffusion,
    ),
    Layout(
        "sdxl-kohya",
        "StableDiffusionXL",
        (_SGM, _KOHYA_UNET),
        ends=KOHYA,
        real=testing.tiny_stable_diffusion_xl,
    ),
    Layout(
        "sdxl-stability",
        "StableDiffusionXL",
        (_SGM, _KOHYA_UNET),
        ends=KOHYA,
        real=testing.tiny_stable_diffusion_xl,
        rename=by_stability,
    ),
    Layout("flux", "Flux", layers=FLUX, prefix=_TR),
    Layout("flux-alpha", "Flux", layers=FLUX, ends=PEFT_ALPHA, prefix=_TR),
    Layout(
        "flux-kohya",
        "Flux",
        ("kohya_flux_lora",),
        BFL,
        KOHYA,
        "lora_unet_",
        flat=True,
    ),
    Layout("flux-comfyui", "Flux", ("kohya_flux_lora",), BFL, KOHYA, _DM),
    Layout("flux-peft-down-up", "Flux", ("kohya_flux_lora",), FLUX, KOHYA[:2], _TR),
    Layout(
        "flux-onetrainer",
        "Flux",
        ("kohya_flux_lora",),
        ("transformer_blocks.{0,1}.attn.{to_q,to_k,to_out.0,add_v_proj}", "x_embedder"),
        KOHYA,
        "lora_transformer_",
        flat=True,
        text=(f"lora_te1_{CLIP}",),
    ),
    Layout(
        "flux-xlabs",
        "Flux",
        ("xlabs_flux_lora",),
        (
            "double_blocks.{0,1}.processor.{proj_lora1,proj_lora2,qkv_lora1,qkv_lora2}",
            "single_blocks.{0,1}.processor.{proj_lora,qkv_lora}",
        ),
        XLABS,
    ),
    Layout(
        "flux-fal-kontext",
        "Flux",
        ("fal_kontext_lora",),
        (*BFL_ALL, "final_layer.linear"),
        prefix=_PM,
    ),
    Layout(
        "flux2-comfyui", "Flux2", ("non_diffusers_flux2_lora",), (*FLUX2, *FLUX2_MORE), prefix=_DM
    ),
    Layout("flux2-peft", "Flux2", ("non_diffusers_flux2_lora",), FLUX2, prefix=_PM),
    Layout("flux2-own-names", "Flux2", ("non_diffusers_flux2_lora",), FLUX2_OWN, prefix=_DM),
    Layout("flux2-kohya", "Flux2", ("kohya_flux2_lora",), FLUX2, KOHYA, "lora_unet_", flat=True),
    Layout("flux3", "Flux3", ("non_diffusers_flux3_lora",), FLUX3, prefix=_DM, since="0.42"),
    *(
        layout
        for loader in ("Wan", "SkyReelsV2", "Helios")
        for layout in (
            Layout(f"{loader}", loader, ("non_diffusers_wan_lora",), (*WAN, *WAN_REST), prefix=_DM),
            Layout(f"{loader}-kohya", loader, ("non_diffusers_wan_lora",), WAN, KOHYA, _DM),
            Layout(
                f"{loader}-image",
                loader,
                ("non_diffusers_wan_lora",),
                (*WAN, *WAN_IMAGE),
                prefix=_DM,
            ),
            Layout(
                f"{loader}-musubi",
                loader,
                ("musubi_wan_lora",),
                WAN,
                KOHYA,
                "lora_unet_",
                flat=True,
            ),
            Layout(
                f"{loader}-musubi-image",
                loader,
                ("musubi_wan_lora",),
                (*WAN, *WAN_IMAGE),
                KOHYA,
                "lora_unet_",
                flat=True,
            ),
        )
    ),
    Layout("ltx", "LTXVideo", ("non_diffusers_ltxv_lora",), PLAIN, prefix=_DM),
    Layout("ltx2", "LTX2", ("non_diffusers_ltx2_lora",), LTX2, prefix=_DM),
    Layout("hidream", "HiDreamImage", ("non_diffusers_hidream_lora",), PLAIN, prefix=_DM),
    Layout("hunyuan", "HunyuanVideo", ("hunyuan_video_lora",), HUNYUAN),
    Layout("hunyuan-prefixed", "HunyuanVideo", ("hunyuan_video_lora",), HUNYUAN, prefix=_DM),
    Layout("lumina", "Lumina2", ("non_diffusers_lumina2_lora",), LUMINA, prefix=_DM),
    Layout("qwen", "QwenImage", ("non_diffusers_qwen_lora",), QWEN, PEFT_ALPHA),
    Layout("qwen-comfyui", "QwenImage", ("non_diffusers_qwen_lora",), QWEN, prefix=_DM),
    Layout("qwen-named", "QwenImage", ("non_diffusers_qwen_lora",), QWEN, NAMED),
    Layout(
        "qwen-kohya",
        "QwenImage",
        ("non_diffusers_qwen_lora",),
        (*QWEN, "{img_in,txt_in,norm_out.linear}"),
        KOHYA,
        "lora_unet_",
        flat=True,
    ),
    Layout("z-image", "ZImage", ("non_diffusers_z_image_lora",), Z_IMAGE, prefix=_DM),
    Layout("z-image-named", "ZImage", ("non_diffusers_z_image_lora",), Z_IMAGE, NAMED),
    Layout("z-image-alpha", "ZImage", ("non_diffusers_z_image_lora",), Z_IMAGE, PEFT_ALPHA, _DM),
    Layout(
        "z-image-kohya",
        "ZImage",
        ("non_diffusers_z_image_lora",),
        Z_IMAGE,
        KOHYA,
        "lora_unet_",
        flat=True,
    ),
    Layout("z-image-dotted", "ZImage", ("non_diffusers_z_image_lora",), Z_FUSED, DOTTED, _DM),
    Layout("z-image-twice", "ZImage", ("non_diffusers_z_image_lora",), Z_TWICE, DOTTED[:2], _DM),
    *(replace(layout, since="0.42") for layout in _LOKR),
    Layout("ideogram", "Ideogram4", ("non_diffusers_ideogram4_lora",), IDEOGRAM, prefix=_DM),
    Layout("ideogram-kohya", "Ideogram4", ("non_diffusers_ideogram4_lora",), IDEOGRAM, KOHYA, _DM),
    Layout("krea-comfyui", "Krea2", ("non_diffusers_krea2_lora",), KREA, prefix=_DM),
    Layout("krea-ai-toolkit", "Krea2", ("non_diffusers_krea2_lora",), KREA, prefix=_PM),
    Layout("anima", "Anima", ("non_diffusers_anima_lora",), ANIMA, prefix=_DM),
    Layout("ace-step", "AceStep", ("non_diffusers_ace_step_lora",), ACE, prefix=_PM),
    Layout("ernie", "ErnieImage", layers=PLAIN, prefix=_DM),
    Layout("ernie-peft", "ErnieImage", layers=PLAIN, prefix=_PM),
    Layout("minimax", "MiniMaxH3", ("non_diffusers_minimax_h3_lora",), MINIMAX, prefix=_DM),
    Layout("minimax-reference", "MiniMaxH3", ("non_diffusers_minimax_h3_lora",), MINIMAX),
    Layout("minimax-diffsynth", "MiniMaxH3", ("non_diffusers_minimax_h3_lora",), MINIMAX, NAMED),
    Layout("minimax-peft", "MiniMaxH3", layers=("transformer_blocks.0.attn.to_q",), ends=NAMED),
    Layout(
        "minimax-alpha-of-file",
        "MiniMaxH3",
        ("non_diffusers_minimax_h3_lora",),
        MINIMAX,
        prefix=_DM,
        about={"alpha": "8"},
    ),
    Layout(
        "minimax-musubi",
        "MiniMaxH3",
        ("non_diffusers_minimax_h3_lora",),
        MINIMAX,
        KOHYA,
        "lora_unet_",
        flat=True,
    ),
]

LAYOUTS = [layout for layout in _ALL if Version(diffusers_version) >= Version(layout.since)]
