"""The README.md of a folder that was converted or saved: what it is, how it was made, what may be done with it.

The license follows from config.json: every FLUX.2 of 9B and more is for non-commercial use only, and that has to be
said where somebody chooses a model, whatever the folder is called.

Sources: the table of models in github.com/black-forest-labs/flux2; on huggingface.co the cards of Qwen, of
stable-diffusion-v1-5 and of stabilityai/stable-diffusion-xl-base-1.0. Front matter:
https://huggingface.co/docs/hub/model-cards.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from clvr_jax.convert.architectures import (
    FLUX2_TRANSFORMER,
    FLUX2_VAE,
    QWEN3,
    QWEN3_VL,
    UNET,
    find_architecture,
    torch_class,
)

from clvr_jax.files import read_json, write_atomically
from clvr_jax.models.autoencoder_kl_flux2 import AutoencoderKLFlux2Config
from clvr_jax.models.flux2_transformer import Flux2TransformerConfig
from clvr_jax.models.qwen3 import Qwen3Config
from clvr_jax.models.qwen3_vl import Qwen3VLConfig
from clvr_jax.models.unet_2d_condition import UNet2DConditionConfig

Config = Mapping[str, Any]
Format = Literal["jax", "torch"]
Models = Mapping[str, tuple[str, Config]]
"""Component ("transformer", or "." for the folder itself) -> (PyTorch's class, config.json)."""


@dataclass(frozen=True)
class License:
    """What may be done with a model.

    identifier, name: `license` and, where that is "other", `license_name` of the front matter. title, link: for people.
    commercial: whether commercial use is allowed; None if only the source knows.
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

# What tells the published sizes of an architecture apart: settings beside it may change, and the license does not.
_SIZES: dict[str, Callable[[Any], tuple[Any, ...]]] = {
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
"""What the format of a folder is, for people."""


@dataclass(frozen=True)
class Provenance:
    """How a folder came to be.

    source: a path or a Hugging Face id; revision: commit of an id, None for a path. command: as it was typed.
    version: of clvr-jax. dtype: of floating-point tensors, None as in the source. recipe: what clvr.json names.
    """

    source: str
    command: str
    version: str
    format: Format
    revision: str | None = None
    dtype: str | None = None
    recipe: str | None = None


def license_of(torch_class: str, config: Config) -> License:
    """The license of a published model, recognised by its size.

    Args:
      torch_class: PyTorch's class, as `_class_name` or `architectures` say.
      config: config.json.
    Returns: `OF_SOURCE` for a class or a size that nobody published.
    Raises: ClvrError for a config.json that our module does not understand.
    """
    architecture = find_architecture(torch_class)
    if architecture is None or torch_class not in _SIZES:
        return OF_SOURCE
    size = _SIZES[torch_class](architecture.config_from_dict(config))
    return _LICENSES.get((torch_class, size), OF_SOURCE)


def license_of_all(models: Models) -> License:
    """The license of a folder of several models: a non-commercial one binds all, else it is that of what draws."""
    terms = {component: license_of(*model) for component, model in models.items()}
    restricted = [found for found in terms.values() if found.commercial is False]
    drawing = [terms[component] for component, (torch_class, _) in models.items() if torch_class in _IMAGE_GENERATORS]
    deciding = set(restricted or drawing or terms.values())
    return deciding.pop() if len(deciding) == 1 else OF_SOURCE


def model_card(name: str, made: Provenance, models: Models) -> str:
    """README.md of a folder, front matter included.

    Args:
      name: the title, that of the folder.
      made: how it came to be.
      models: what it holds.
    """
    binding = license_of_all(models)
    origin = [
        ("Source", f"`{made.source}`" + (f", revision `{made.revision}`" if made.revision else "")),
        ("Made by", f"`{made.command}`"),
        ("clvr-jax", made.version),
        ("Layout", FORMATS[made.format]),
        ("Numbers", made.dtype or "as in the source, bit for bit"),
        *([("Recipe", f"`{made.recipe}`")] if made.recipe else []),
    ]
    base_models = [made.source.partition("@")[0]] if made.revision else []
    lines = [
        *front_matter(made.format, models, binding, base_models),
        f"\n# {name}\n",
        f"{', '.join(titles(models))}.\n",
        *markdown_table(("", ""), origin),
        *models_and_license(models, binding),
    ]
    return "\n".join(lines) + "\n"


def titles(models: Models) -> list[str]:
    """What the models are, for people, each once."""
    return list(dict.fromkeys(_title(torch_class) for torch_class, _ in models.values()))


def models_and_license(models: Models, binding: License) -> list[str]:
    """The lines of a card that say what a folder holds and what may be done with it; `binding` holds for all of it."""
    parts = [(f"`{component}`", _title(model[0]), license_of(*model).title) for component, model in models.items()]
    notice = f"**{binding.notice}**" if binding.commercial is False else binding.notice
    lines = ["\n## Models\n", *markdown_table(("Folder", "Model", "License"), parts), "\n## License\n", notice]
    if binding.link:
        lines.append(f"Its text: {binding.link}\n")
        lines.append(
            "It was recognised by the sizes of the models; where their source says otherwise, the source holds."
        )
    return lines


def add_model_card(folder: Path, card: str) -> bool:
    """Writes README.md unless the folder has one, which is kept as it is. Returns whether it wrote."""
    if (folder / "README.md").exists():
        return False
    write_atomically(folder / "README.md", card.encode())
    return True


def card_of_pipeline(folder: Path, name: str, saved_by: str, dtype: str) -> None:
    """Adds the card of a pipeline that was saved from memory, `saved_by` a function; its models are in `folder`."""
    found = {path.name: torch_class(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    models = {part: (kind, read_json(folder / part / "config.json")) for part, kind in found.items() if kind}
    made = Provenance("weights in memory", saved_by, version("clvr-jax"), "torch", dtype=dtype)
    add_model_card(folder, model_card(name, made, models))


def front_matter(
    format: Format, models: Models, binding: License, base_models: Sequence[str] = (), relation: str | None = None
) -> list[str]:
    """The lines that the Hub reads at the beginning of a card.

    Args:
      format: of the folder.
      models: what it holds.
      binding: its license.
      base_models: Hugging Face ids that it was made from.
      relation: how, "merge" say, if the Hub would not find out.
    """
    classes = {torch_class for torch_class, _ in models.values()}
    tags = ["clvr-jax", "text-to-image"] if classes & set(_IMAGE_GENERATORS) else ["clvr-jax"]
    if format == "jax":
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
    return ["---", *fields, f"library_name: {library}", "tags:", *(f"- {tag}" for tag in tags), "---"]


def _title(torch_class: str) -> str:
    architecture = find_architecture(torch_class)
    return architecture.title if architecture else torch_class


def markdown_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Returns the lines of a table in Markdown."""
    cells = ([cell.replace("|", r"\|") for cell in row] for row in (head, ("---",) * len(head), *rows))
    return [f"| {' | '.join(row)} |" for row in cells]
