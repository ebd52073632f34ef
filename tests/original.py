"""Tiny pipelines in the layout that community checkpoints come in: one file, LDM's names."""

import re

import torch
from safetensors.torch import save_file

_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_checkpoint(pipeline, path, dtype=torch.float32):
    """Writes a Stable Diffusion (1 or XL) as one file."""
    tensors = {
        f"model.diffusion_model.{unet_name(pipeline.unet, key)}": value
        for key, value in pipeline.unet.state_dict().items()
    }
    for key, value in pipeline.vae.state_dict().items():
        name = vae_name(len(pipeline.vae.config.block_out_channels), key)
        is_square = "attn" in name and value.ndim == 2  # there a convolution
        tensors[f"first_stage_model.{name}"] = value[..., None, None] if is_square else value
    two = getattr(pipeline, "text_encoder_2", None) is not None
    prefix = "conditioner.embedders.0.transformer" if two else "cond_stage_model.transformer"
    for key, value in pipeline.text_encoder.state_dict().items():
        tensors[f"{prefix}.text_model.{key.removeprefix('text_model.')}"] = value
    if two:
        tensors.update(open_clip(pipeline.text_encoder_2.state_dict()))
    cast = {key: value.to(dtype).contiguous().clone() for key, value in tensors.items()}
    save_file(cast, path)


def unet_name(unet, key):
    layers = unet.config.layers_per_block
    for ours, theirs in _TOP.items():
        if key.startswith(f"{ours}."):
            return key.replace(ours, theirs, 1)
    found = re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key)
    if found:
        kind, number, rest = found.groups()
        at = 1 if kind == "attentions" else 2 * int(number)
        return f"middle_block.{at}.{part_name(kind, rest)}"
    side, block, kind, number, rest = re.match(
        r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", key
    ).groups()
    block, number = int(block), int(number)
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.{rest.replace('conv', 'op', 1)}"
    if kind == "upsamplers":
        has_attention = hasattr(unet.up_blocks[block], "attentions")
        at = block * (layers + 1) + layers
        return f"output_blocks.{at}.{2 if has_attention else 1}.{rest}"
    inner = 0 if kind == "resnets" else 1
    at = block * (layers + 1) + number + (1 if side == "down" else 0)
    side = "input_blocks" if side == "down" else "output_blocks"
    return f"{side}.{at}.{inner}.{part_name(kind, rest)}"


def part_name(kind, rest):
    if kind == "attentions":
        return rest
    head, _, tail = rest.rpartition(".")
    return f"{_RESNET[head]}.{tail}"


def vae_name(blocks, key):
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = key.replace("down_blocks", "down").replace("resnets", "block")
    key = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}", key)
    key = key.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    if "mid_block.attentions.0" in key:
        key = key.replace("mid_block.attentions.0", "mid.attn_1")
        for ours, theirs in _ATTENTION.items():
            key = key.replace(f".{ours}.", f".{theirs}.")
    return key


def open_clip(state):
    prefix = "conditioner.embedders.1.model."
    fused = {}
    out = {}
    for key, value in state.items():
        key = key.removeprefix("text_model.")
        if key == "text_projection.weight":
            out["text_projection"] = value.T
        elif "embeddings" in key:
            is_token = "token" in key
            out["token_embedding.weight" if is_token else "positional_embedding"] = value
        elif key.startswith("final_layer_norm"):
            out[key.replace("final_layer_norm", "ln_final")] = value
        else:
            name = key.replace("encoder.layers.", "transformer.resblocks.")
            name = name.replace("layer_norm", "ln_").replace("mlp.fc1", "mlp.c_fc")
            name = name.replace("mlp.fc2", "mlp.c_proj").replace("self_attn", "attn")
            found = re.match(r"(.*attn)\.([qkv])_proj\.(\w+)", name)
            if found:
                fused.setdefault((found[1], found[3]), {})[found[2]] = value
            else:
                out[name] = value
    for (name, kind), parts in fused.items():
        out[f"{name}.in_proj_{kind}"] = torch.cat([parts[letter] for letter in "qkv"])
    return {prefix + key: value for key, value in out.items()}
