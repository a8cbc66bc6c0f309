"""What the tests of LoRA files share: small models in both frameworks, adapters by PEFT, files in every spelling."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import diffusers
import jax
import numpy as np
import torch
from flax import nnx
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from clvr_jax.convert.architectures import flux2_transformer, unet_2d_condition
from clvr_jax.convert.rules import KeyMapping, entries
from clvr_jax.models.common.abstract import abstract_module
from clvr_jax.models.flux2 import Flux2Transformer
from clvr_jax.models.stable_diffusion import UNet2DCondition
from tests.models.flux2 import test_transformer as flux2
from tests.models.parity import load_state, randomize
from tests.models.stable_diffusion import test_unet_2d_condition as unet

A, B = ".lora_A.weight", ".lora_B.weight"

# What PEFT adapts, whole names as regular expressions; of the UNet convolutions too.
FLUX2_TARGETS = (
    r"single.*\.attn\.to_(qkv_mlp_proj|out)"
    r"|.*(to_q|to_k|to_v|add_k_proj|to_out\.0|to_add_out|linear_in|linear|proj_out)"
)
UNET_TARGETS = (
    r".*(to_q|to_k|to_v|to_out\.0|proj_in|ff\.net\.0\.proj|ff\.net\.2|linear_1)"
    r"|.*(conv1|conv_shortcut|downsamplers\.0\.conv)"
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model in both frameworks, and the diffusers pipeline that reads its LoRA files."""

    model: Callable[[nnx.Rngs], nnx.Module]
    reference: Callable[[], torch.nn.Module]
    key_mapping: KeyMapping
    run: Callable[..., Any]
    run_reference: Callable[..., Any]
    make_inputs: Callable[[], Any]
    pipeline: Callable[[Any], Any]
    targets: str
    component: str

    def make_pair(self) -> Any:
        """Our model, which no test changes, and a PyTorch model with the same weights, which tests may change."""
        model, reference = _models(self)
        return model, copy.deepcopy(reference)


@functools.cache
def _models(kind: Kind) -> Any:
    model, reference = abstract_module(kind.model), kind.reference()
    load_state(model, reference, kind.key_mapping)
    return model, reference


def _unet_kind(config: Any, pipeline: Any, **empty: None) -> Kind:
    return Kind(
        model=lambda rngs: UNet2DCondition(config, rngs=rngs),
        reference=lambda: randomize(
            diffusers.UNet2DConditionModel.from_config(unet_2d_condition.config_to_dict(config))
        ),
        key_mapping=unet_2d_condition.key_mapping(config),
        run=unet.run,
        run_reference=unet.run_reference,
        make_inputs=lambda: unet.make_inputs(config),
        pipeline=lambda model: pipeline(**dict.fromkeys(OTHER_PARTS), **empty, unet=model),
        targets=UNET_TARGETS,
        component="unet",
    )


OTHER_PARTS = ("scheduler", "vae", "text_encoder", "tokenizer")
KINDS = {
    "flux2": Kind(
        model=lambda rngs: Flux2Transformer(flux2.SMALL, rngs=rngs),
        reference=lambda: flux2.make_reference(flux2.SMALL),
        key_mapping=flux2_transformer.KEY_MAPPING,
        run=flux2.run,
        run_reference=flux2.run_reference,
        make_inputs=lambda: flux2.make_inputs(flux2.SMALL, references=((2, 3),)),
        pipeline=lambda model: diffusers.Flux2KleinPipeline(**dict.fromkeys(OTHER_PARTS), transformer=model),
        targets=FLUX2_TARGETS,
        component="transformer",
    ),
    "sdxl": _unet_kind(unet.TWO_LEVEL_SDXL, diffusers.StableDiffusionXLPipeline, text_encoder_2=None, tokenizer_2=None),
    "sd15": _unet_kind(unet.SD15, diffusers.StableDiffusionPipeline, safety_checker=None, feature_extractor=None),
}


def outputs(kind: Kind, state: Any) -> jax.Array:
    """Our output with these weights."""
    return _compiled(kind)(state)


@functools.cache
def _compiled(kind: Kind) -> Callable[[Any], jax.Array]:
    graphdef = nnx.graphdef(_models(kind)[0])
    return jax.jit(lambda state: kind.run(nnx.merge(graphdef, state), kind.make_inputs()))


def reference_outputs(kind: Kind, reference: Any) -> torch.Tensor:
    with torch.no_grad():
        return kind.run_reference(reference, kind.make_inputs())


def add_adapter(reference: torch.nn.Module, targets: str, rank: int = 4, alpha: float = 6.0, **options: Any) -> None:
    """A random PEFT adapter, strong enough that its absence would show."""
    reference.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **options))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5 / 2)


def save_by_diffusers(kind: Kind, reference: torch.nn.Module, folder: Any) -> None:
    """`save_lora_weights` of the pipeline, with PEFT's config as metadata."""
    layers = get_peft_model_state_dict(reference)
    config = {
        key: list(v) if isinstance(v, set) else v for key, v in reference.peft_config["default"].to_dict().items()
    }
    kind.pipeline(reference).save_lora_weights(
        folder,
        **{f"{kind.component}_lora_layers": layers, f"{kind.component}_lora_adapter_metadata": config},
    )


def random_factors(shapes: dict[str, tuple[int, ...]], rank: int = 3) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module -> (down, up) for the PyTorch weights of these shapes."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(shape, generator=generator)

    return {
        module: (draw(rank, *shape[1:]), draw(shape[0], rank, *(1 for _ in shape[2:])))
        for module, shape in shapes.items()
    }


def save_factors(
    path: Any, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], down: str, up: str, alpha: float | None = None
) -> None:
    """Module -> factors as keys `module + down` and `module + up`, with one alpha tensor for each if it is given."""
    tensors = {}
    for module, (a, b) in factors.items():
        tensors |= {module + down: a.contiguous(), module + up: b.contiguous()}
        if alpha is not None:
            tensors[f"{module}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)


def same(one: Any, other: Any) -> bool:
    """Whether two LoRA trees are the same, bit for bit, scales included."""
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        np.array_equal(a, b) and a.dtype == b.dtype
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def shapes_of(kind: Kind, model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Module -> shape of its PyTorch weight, for everything that can be adapted."""
    plan = [entry for entry in entries(nnx.state(model), kind.key_mapping) if entry.path[-1] == "kernel"]
    return {key.removesuffix(".weight"): entry.torch_shape for entry in plan for key in entry.keys}
