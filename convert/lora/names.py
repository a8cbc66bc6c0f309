"""The names of the modules of FLUX.2 and of Stable Diffusion's UNet in LoRA files.

Trainers write the names of diffusers, of the original code (BFL for FLUX.2, latent diffusion for the UNet), or either
with underscores in place of dots. All aliases are generated from the model's own names, so that no name has to be
parsed, and a name that is not among them belongs to another model.

Source of the names: diffusers `loaders/lora_conversion_utils.py`, kohya-ss `sd-scripts`, ai-toolkit, OneTrainer,
LyCORIS.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from clvr_jax.convert.single_file.flux2 import bfl_key

TEXT_ENCODER = re.compile(r"(text_encoder(_\d)?\.|lora_te\d?_).*")
_UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")  # kohya and musubi, OneTrainer, LyCORIS
_PREFIX = re.compile(r"^(base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|transformer\.|unet\.)+")

_QKV = re.compile(r"(?:to|add)_([qkv])(?:_proj)?$")
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_LATENT_DIFFUSION = (
    (r"^conv_in$", "input_blocks.0.0"),
    (r"^conv_out$", "out.2"),
    (r"^time_embedding\.linear_1$", "time_embed.0"),
    (r"^time_embedding\.linear_2$", "time_embed.2"),
    (r"^add_embedding\.linear_1$", "label_emb.0.0"),
    (r"^add_embedding\.linear_2$", "label_emb.0.2"),
    (r"^mid_block\.resnets\.0\.", "middle_block.0."),
    (r"^mid_block\.attentions\.0\.", "middle_block.1."),
    (r"^mid_block\.resnets\.1\.", "middle_block.2."),
    (r"\.conv1$", ".in_layers.2"),
    (r"\.conv2$", ".out_layers.3"),
    (r"\.time_emb_proj$", ".emb_layers.1"),
    (r"\.conv_shortcut$", ".skip_connection"),
)


@dataclass(frozen=True)
class KeyAlias:
    """The modules to which one name in a file refers.

    modules: diffusers' names, more than one if the original code fuses them; their rows are concatenated in this order.
    swapped: whether the two halves of the rows are exchanged, (shift, scale) in BFL's code for diffusers' (scale,
    shift).
    """

    modules: tuple[str, ...]
    swapped: bool = False


def key_aliases(modules: Collection[str]) -> dict[str, KeyAlias]:
    """Returns every name, without prefix, that a file may use for the modules of one model.

    Args:
      modules: diffusers' names of all modules with a kernel, for example "transformer_blocks.0.attn.to_q".
    Returns: name in a file -> the modules to which it refers.
    """
    names = {module: KeyAlias((module,)) for module in modules}
    others: dict[str, list[str]] = {}
    layers = sum(re.fullmatch(r"down_blocks\.0\.resnets\.\d+\.conv1", module) is not None for module in modules)
    attending = {module.split(".")[1] for module in modules if module.startswith("up_blocks.") and ".attn1." in module}
    for module in sorted(modules, key=_place_in_qkv):
        original = _latent_diffusion(module, layers, attending) if layers else _bfl(module)
        for other in {original, _attention_processor(module)} - {module}:
            others.setdefault(other, []).append(module)
    names |= {name: KeyAlias(tuple(group), group == ["norm_out.linear"]) for name, group in others.items()}
    underscored = {prefix + name.replace(".", "_"): alias for name, alias in names.items() for prefix in _UNDERSCORED}
    return names | underscored


def original_names(modules: Collection[str]) -> dict[str, KeyAlias]:
    """Returns the names of the original code (BFL's) for the modules of a FLUX.2 transformer.

    Args:
      modules: diffusers' names of all modules with a kernel.
    """
    groups: dict[str, list[str]] = {}
    for module in sorted(modules, key=_place_in_qkv):
        groups.setdefault(_bfl(module), []).append(module)
    return {name: KeyAlias(tuple(group), group == ["norm_out.linear"]) for name, group in groups.items()}


def without_prefix(name: str) -> str:
    """Removes the prefix with the name of the model from a module's name in a file."""
    return _PREFIX.sub("", name)


def component(modules: Collection[str]) -> str:
    """Returns the name of the model in a diffusers pipeline: "unet" or "transformer"."""
    return "unet" if any(module.startswith("mid_block.") for module in modules) else "transformer"


def _place_in_qkv(module: str) -> int:
    match = _QKV.search(module)
    return "qkv".index(match[1]) if match else 0


def _bfl(module: str) -> str:
    return bfl_key(f"{module}.weight").removesuffix(".weight")


def _attention_processor(module: str) -> str:
    """Returns the name in diffusers before PEFT: factors in attention processors, output projection without index."""
    return re.sub(r"\.(attn[12])\.(to_[qkv]|to_out)(\.0)?$", r".\1.processor.\2", module)


def _latent_diffusion(module: str, layers: int, attending: Collection[str]) -> str:
    """Returns the name in latent diffusion, which counts resnets and resolution changes in one sequence.

    Args:
      module: diffusers' name.
      layers: resnets of a down block.
      attending: indices of the up blocks that have transformers.
    """
    if match := _BLOCK.fullmatch(module):
        side, block, part, index, rest = match.groups()
        # Each block has one index more: a down block for the resolution change, an up block for a resnet.
        # input_blocks.0 is conv_in.
        first = int(block) * (layers + 1) + (side == "down")
        if part == "downsamplers":
            return f"input_blocks.{first + layers}.0.op"
        if part == "upsamplers":
            return f"output_blocks.{first + layers}.{2 if block in attending else 1}.conv"
        blocks, member = {"down": "input", "up": "output"}[side], int(part == "attentions")
        module = f"{blocks}_blocks.{first + int(index)}.{member}.{rest}"
    for pattern, name in _LATENT_DIFFUSION:
        module = re.sub(pattern, name, module)
    return module
