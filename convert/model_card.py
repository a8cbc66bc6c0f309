"""The model card (README.md) of a converted or saved directory: its models, its origin and its license.

The license follows from config.json: every FLUX.2 of 9B and more is for non-commercial use only, and users must see
that when they choose a model, regardless of the name of the directory.

Sources: the table of models in github.com/black-forest-labs/flux2; on huggingface.co the cards of Qwen, of
stable-diffusion-v1-5 and of stabilityai/stable-diffusion-xl-base-1.0. Front matter:
https://huggingface.co/docs/hub/model-cards.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from clvr_jax.convert.architectures import (
    FLUX2_TRANSFORMER,
    FLUX2_VAE,
    QWEN3,
    QWEN3_VL,
    UNET,
    ModelConfig,
    find_architecture,
    torch_class,
)
from clvr_jax.display.tables import Table
from clvr_jax.files.atomic_io import read_json, write_atomically
from clvr_jax.files.json_input import UncheckedJSON
from clvr_jax.models.flux2 import AutoencoderKLFlux2Config, Flux2TransformerConfig
from clvr_jax.models.qwen3 import Qwen3Config
from clvr_jax.models.qwen3_vl import Qwen3VLConfig
from clvr_jax.models.stable_diffusion import UNet2DConditionConfig

Format = Literal["jax", "torch"]
Relation = Literal["finetune", "adapter", "merge"]
"""How the Hub names the relation of a model to its base models."""
Models = Mapping[str, tuple[str, UncheckedJSON]]
"""Component ("transformer", or "." for the directory itself) -> (PyTorch's class, config.json)."""


@dataclass(frozen=True)
class License:
    """The license of a model.

    identifier, name: `license` and, if that is "other", `license_name` of the front matter. title: its name in the
    card. link: address of its text. commercial: whether commercial use is allowed; None if only the source states it.
    notice: one sentence, for a warning and for the card.
    """

    identifier: str
    title: str
    link: str | None
    commercial: bool | None
    notice: str
    name: str | None = None


APACHE = License(
    "apache-2.0",
    "Apache-2.0",
    "https://www.apache.org/licenses/LICENSE-2.0",
    True,
    "Apache-2.0: commercial use is allowed.",
)
FLUX_NON_COMMERCIAL = License(
    "other",
    "FLUX Non-Commercial License",
    "https://github.com/black-forest-labs/flux2/tree/main/model_licenses",
    False,
    "FLUX Non-Commercial License: the weights and all that derives from them are for non-commercial use only.",
    "flux-non-commercial-license",
)
OPEN_RAIL_PLUS_PLUS_M = License(
    "openrail++",
    "CreativeML Open RAIL++-M",
    "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md",
    True,
    "CreativeML Open RAIL++-M, that of SDXL base: its restrictions of use go with the weights. SDXL Turbo, of the same "
    "shape, is under Stability AI's own license.",
)
OPEN_RAIL_M = License(
    "creativeml-openrail-m",
    "CreativeML Open RAIL-M",
    "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
    True,
    "CreativeML Open RAIL-M, that of Stable Diffusion 1.5: its restrictions of use go with the weights.",
)
OF_SOURCE = License(
    "other",
    "the license of the source",
    None,
    None,
    "The license of the source holds.",
    "license-of-the-source",
)
OWN = License(
    "other",
    "not stated",
    None,
    None,
    "The weights were trained from random ones; whoever trained them chooses the license.",
    "not-stated",
)

# The size of an architecture by which its published models are recognized: other fields may change without the license.
_SIZES: dict[str, Callable[[ModelConfig], tuple[Hashable, ...]]] = {
    FLUX2_TRANSFORMER.torch_class: lambda config: (config.num_layers, config.num_single_layers, config.inner_dim),
    FLUX2_VAE.torch_class: lambda config: (config.block_out_channels, config.latent_channels),
    UNET.torch_class: lambda config: (
        config.block_out_channels,
        config.cross_attention_dim,
        config.transformer_layers_per_block,
    ),
    QWEN3.torch_class: lambda config: (config.num_hidden_layers, config.hidden_size),
    QWEN3_VL.torch_class: lambda config: (config.text.num_hidden_layers, config.text.hidden_size),
}
_PUBLISHED = (
    (FLUX2_TRANSFORMER, Flux2TransformerConfig.klein_4b(), APACHE),
    (FLUX2_TRANSFORMER, Flux2TransformerConfig.klein_9b(), FLUX_NON_COMMERCIAL),
    (FLUX2_TRANSFORMER, Flux2TransformerConfig.dev(), FLUX_NON_COMMERCIAL),
    (FLUX2_VAE, AutoencoderKLFlux2Config(), APACHE),
    (UNET, UNet2DConditionConfig.sdxl(), OPEN_RAIL_PLUS_PLUS_M),
    (UNET, UNet2DConditionConfig.sd15(), OPEN_RAIL_M),
    (QWEN3, Qwen3Config.qwen3_4b(), APACHE),
    (QWEN3, Qwen3Config.qwen3_8b(), APACHE),
    (QWEN3_VL, Qwen3VLConfig.qwen3_vl_2b(), APACHE),
    (QWEN3_VL, Qwen3VLConfig.qwen3_vl_4b(), APACHE),
    (QWEN3_VL, Qwen3VLConfig.qwen3_vl_8b(), APACHE),
)
_LICENSES = {
    (architecture.torch_class, _SIZES[architecture.torch_class](config)): terms
    for architecture, config, terms in _PUBLISHED
}
_IMAGE_GENERATORS = (FLUX2_TRANSFORMER.torch_class, UNET.torch_class)
FORMATS: Mapping[Format, str] = {
    "jax": "JAX: `params/` beside each config.json is an Orbax checkpoint; clvr-jax reads it",
    "torch": "PyTorch: safetensors as diffusers and transformers read them",
}
"""Format of a directory -> its description in the card."""


@dataclass(frozen=True)
class Provenance:
    """The origin of a directory.

    source: a path or a Hugging Face id. command: the command line or function that created it. version: of clvr-jax.
    format: of its models. revision: commit of a Hugging Face id, None for a path. dtype: of floating-point tensors,
    None if as in the source. recipe: the recipe that trained the models. steps: optimizer steps of its run. base_model:
    Hugging Face id of the model from which training started; `source` if that has a revision. relation: to it.
    """

    source: str
    command: str
    version: str
    format: Format
    revision: str | None = None
    dtype: str | None = None
    recipe: str | None = None
    steps: int | None = None
    base_model: str | None = None
    relation: Relation | None = None


def license_of(torch_class: str, config: UncheckedJSON, unrecognized: License = OF_SOURCE) -> License:
    """Returns the license of a published model, which is recognized by its size.

    Args:
      torch_class: PyTorch's class, `_class_name` or `architectures` in config.json.
      config: config.json.
      unrecognized: the license of a class or size that is not published.
    Returns: the license.
    Raises: ClvrError for a config.json that our module does not support.
    """
    architecture = find_architecture(torch_class)
    if architecture is None or torch_class not in _SIZES:
        return unrecognized
    size = _SIZES[torch_class](architecture.config_from_dict(config))
    return _LICENSES.get((torch_class, size), unrecognized)


def license_of_all(models: Models, unrecognized: License = OF_SOURCE) -> License:
    """Returns the license of several models: a non-commercial one if any is, else that of the image generator."""
    terms = {component: license_of(*model, unrecognized) for component, model in models.items()}
    restricted = [found for found in terms.values() if found.commercial is False]
    generating = [terms[part] for part, (torch_class, _) in models.items() if torch_class in _IMAGE_GENERATORS]
    deciding = set(restricted or generating or terms.values())
    return deciding.pop() if len(deciding) == 1 else unrecognized


def model_card(name: str, made: Provenance, models: Models, unrecognized: License = OF_SOURCE) -> str:
    """Returns the text of README.md with its front matter.

    Args:
      name: the title.
      made: the origin of the directory.
      models: the models in the directory.
      unrecognized: the license of models whose size is not published.
    """
    binding = license_of_all(models, unrecognized)
    origin = [
        ("Source", f"`{made.source}`" + (f", revision `{made.revision}`" if made.revision else "")),
        ("Made by", f"`{made.command}`"),
        ("clvr-jax", made.version),
        ("Layout", FORMATS[made.format]),
        ("Numbers", made.dtype or "as in the source, bit for bit"),
        *([("Recipe", f"`{made.recipe}`")] if made.recipe else []),
        *([("Steps", f"{made.steps:,}")] if made.steps is not None else []),
    ]
    base_model = made.base_model or (made.source.partition("@")[0] if made.revision else None)
    lines = [
        *front_matter(made.format, models, binding, [base_model] if base_model else [], made.relation),
        f"\n# {name}\n",
        f"{', '.join(titles(models))}.\n",
        *Table(("", ""), [origin], is_markdown=True).markdown(),
        *models_and_license(models, binding, unrecognized),
    ]
    return "\n".join(lines) + "\n"


def titles(models: Models) -> list[str]:
    """Returns the names of the models' architectures, each once."""
    return list(dict.fromkeys(_title(torch_class) for torch_class, _ in models.values()))


def models_and_license(models: Models, binding: License, unrecognized: License = OF_SOURCE) -> list[str]:
    """Returns the lines of a card with the models and their licenses; `binding` is the license of the directory."""
    licenses = {component: license_of(*model, unrecognized).title for component, model in models.items()}
    parts = [(f"`{component}`", _title(model[0]), licenses[component]) for component, model in models.items()]
    notice = f"**{binding.notice}**" if binding.commercial is False else binding.notice
    table = Table(("Directory", "Model", "License"), [parts], is_markdown=True)
    lines = ["\n## Models\n", *table.markdown(), "\n## License\n", notice]
    if binding.link:
        lines.append(f"Its text: {binding.link}\n")
    if binding.link and binding is not unrecognized:
        lines.append(
            "It was recognized by the sizes of the models; if their source states another license, that one applies."
        )
    return lines


def models_in(directory: Path) -> dict[str, tuple[str, UncheckedJSON]]:
    """Returns component -> (PyTorch's class, config.json) of a directory, for the model card."""
    places = [directory] if torch_class(directory) else sorted(path for path in directory.iterdir() if path.is_dir())
    found = {str(place.relative_to(directory)): (torch_class(place), place) for place in places}
    return {name: (kind, read_json(place / "config.json")) for name, (kind, place) in found.items() if kind}


def add_model_card(directory: Path, card: str) -> bool:
    """Writes README.md unless the directory has one. Returns: whether it was written."""
    if (directory / "README.md").exists():
        return False
    write_atomically(directory / "README.md", card.encode())
    return True


def card_of_pipeline(directory: Path, name: str, saved_by: str, dtype: str) -> None:
    """Adds the model card of a pipeline or model that was saved from memory.

    Args:
      directory: contains the models.
      name: the title of the card.
      saved_by: the function that saved it.
      dtype: of floating-point tensors.
    """
    made = Provenance("weights in memory", saved_by, version("clvr-jax"), "torch", dtype=dtype)
    add_model_card(directory, model_card(name, made, models_in(directory)))


def front_matter(
    form: Format,
    models: Models,
    binding: License,
    base_models: Sequence[str] = (),
    relation: Relation | None = None,
    more_tags: Sequence[str] = (),
) -> list[str]:
    """Returns the lines at the beginning of a card that the Hub reads.

    Args:
      form: format of the models.
      models: the models in the directory.
      binding: the license of the directory.
      base_models: Hugging Face ids of the models from which it was derived.
      relation: to the base models; None if the Hub can infer it.
      more_tags: tags that do not follow from the models.
    """
    classes = {torch_class for torch_class, _ in models.values()}
    tags = ["clvr-jax", "text-to-image"] if classes & set(_IMAGE_GENERATORS) else ["clvr-jax"]
    tags += more_tags
    if form == "jax":
        library = "clvr-jax"
        tags.append("jax")
    else:
        library = "transformers" if classes <= {QWEN3.torch_class, QWEN3_VL.torch_class} else "diffusers"
    fields = [f"license: {binding.identifier}"]
    if binding.name:
        fields.append(f"license_name: {binding.name}")
        fields += [f"license_link: {binding.link}"] if binding.link else []
    if len(base_models) == 1:
        fields.append(f"base_model: {base_models[0]}")
    elif base_models:
        fields += ["base_model:", *(f"- {name}" for name in base_models)]
    if base_models and relation:
        fields.append(f"base_model_relation: {relation}")
    fields.append(f"library_name: {library}")
    if task := _pipeline_tag(classes):
        fields.append(f"pipeline_tag: {task}")
    return ["---", *fields, "tags:", *(f"- {tag}" for tag in tags), "---"]


def _pipeline_tag(classes: Set[str]) -> str | None:
    """Returns the task by which the Hub lists models of these classes; None for parts, such as an autoencoder."""
    if classes & set(_IMAGE_GENERATORS):
        return "text-to-image"
    if QWEN3_VL.torch_class in classes:
        return "image-text-to-text"
    return "text-generation" if classes == {QWEN3.torch_class} else None


def _title(torch_class: str) -> str:
    architecture = find_architecture(torch_class)
    return architecture.title if architecture else torch_class
