"""The cards of what a run exports: base model, license, task; of models, and of a LoRA."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from clvr_jax.configs import flux2_lora, flux2_sft, pprl_sdxl, qwen3_vl_sft, shapes_controller, shapes_sft, shapes_vae
from clvr_jax.convert.architectures import FLUX2_TRANSFORMER, FLUX2_VAE, QWEN3_VL, UNET
from clvr_jax.models.flux2 import AutoencoderKLFlux2Config, Flux2TransformerConfig
from clvr_jax.models.qwen3_vl import Qwen3VLConfig
from clvr_jax.models.stable_diffusion import UNet2DConditionConfig
from clvr_jax.training.export_card import add_export_cards, base_of
from clvr_jax.training.recipes import load_recipe, train

KLEIN = Flux2TransformerConfig.klein_9b()
SMALL = dataclasses.replace(KLEIN, num_layers=1)
HUB = "black-forest-labs/FLUX.2-klein-base-9B"
LINE = Path(__file__).parent / "line_recipe.py"


def write_model(directory, architecture, config):
    directory.mkdir(parents=True, exist_ok=True)
    content = {"_class_name": architecture.torch_class, **architecture.config_to_dict(config)}
    (directory / "config.json").write_text(json.dumps(content))


def write_lora(directory):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "pytorch_lora_weights.safetensors").write_bytes(b"")


def card(directory):
    text = (directory / "README.md").read_text()
    return text, ModelCard(text).data.to_dict()


def configured(recipe, **fields):
    return dataclasses.replace(recipe.CONFIG, **fields)


def test_fine_tuned_weights_name_their_base_and_keep_its_license(tmp_path):
    write_model(tmp_path / "transformer", FLUX2_TRANSFORMER, KLEIN)
    write_model(tmp_path / "vae", FLUX2_VAE, AutoencoderKLFlux2Config())
    (tmp_path / "README.md").write_text("of save_pretrained, which knows no base")
    add_export_cards(tmp_path, "mine", "flux2_sft", configured(flux2_sft, model=f"{HUB}@main"), 2000)
    text, data = card(tmp_path)
    assert data == {
        "base_model": HUB,
        "base_model_relation": "finetune",
        "library_name": "diffusers",
        "license": "other",
        "license_link": data["license_link"],
        "license_name": "flux-non-commercial-license",
        "pipeline_tag": "text-to-image",
        "tags": ["clvr-jax", "text-to-image"],
    }
    assert "# mine" in text
    assert f"| Source | `{HUB}@main` |" in text
    assert "| Made by | `clvr train flux2_sft` |" in text
    assert "| Steps | 2,000 |" in text


def test_a_controller_is_a_model_that_reads_images(tmp_path):
    write_model(tmp_path, QWEN3_VL, Qwen3VLConfig.qwen3_vl_8b())
    config = configured(qwen3_vl_sft, model="Qwen/Qwen3-VL-8B-Instruct")
    add_export_cards(tmp_path, "mine", "qwen3_vl_sft", config, 10)
    _, data = card(tmp_path)
    assert (data["base_model"], data["license"]) == ("Qwen/Qwen3-VL-8B-Instruct", "apache-2.0")
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "image-text-to-text")


def test_weights_that_were_trained_from_nothing_have_no_base_and_no_license_yet(tmp_path):
    write_model(tmp_path / "vae", FLUX2_VAE, dataclasses.replace(AutoencoderKLFlux2Config(), latent_channels=8))
    add_export_cards(tmp_path, "mine", "shapes_vae", shapes_vae.CONFIG, 3000)
    text, data = card(tmp_path)
    assert "base_model" not in data
    assert (data["license"], data["license_name"]) == ("other", "not-stated")
    assert "| Source | `random weights` |" in text


@pytest.mark.parametrize(("config", "license_name"), [(KLEIN, "flux-non-commercial-license"), (SMALL, None)])
def test_a_lora_is_an_adapter_under_the_license_of_its_base(config, license_name, tmp_path):
    write_model(tmp_path / "base" / "transformer", FLUX2_TRANSFORMER, config)
    (tmp_path / "base" / "model_index.json").write_text("{}")
    write_lora(tmp_path / "export")
    add_export_cards(
        tmp_path / "export", "mine", "flux2_lora", configured(flux2_lora, model=str(tmp_path / "base")), 1000
    )
    text, data = card(tmp_path / "export")
    assert data["tags"] == ["clvr-jax", "text-to-image", "lora"]
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert data["license_name"] == (license_name or "license-of-the-source")
    assert ("**FLUX Non-Commercial License" in text) is (license_name is not None)
    assert "base_model" not in data  # a directory on this machine is no name on the Hub


def test_rl_exports_a_pipeline_and_a_lora_each_with_its_card(tmp_path):
    sdxl = UNet2DConditionConfig.sdxl()
    for directory in ("base", "export"):
        write_model(tmp_path / directory / "unet", UNET, sdxl)
    (tmp_path / "base" / "model_index.json").write_text("{}")
    write_lora(tmp_path / "export" / "lora")
    add_export_cards(tmp_path / "export", "mine", "pprl_sdxl", configured(pprl_sdxl, model=str(tmp_path / "base")), 10)
    assert card(tmp_path / "export")[1]["license"] == "openrail++"
    text, data = card(tmp_path / "export" / "lora")
    assert data["license"] == "openrail++"
    assert "# mine, LoRA" in text


def test_the_lora_of_a_base_that_is_gone_has_a_card(tmp_path):
    write_lora(tmp_path / "export")
    config = configured(flux2_lora, model=str(tmp_path / "base"))
    add_export_cards(tmp_path / "export", "mine", "flux2_lora", config, 1000)
    assert card(tmp_path / "export")[1]["license_name"] == "license-of-the-source"


def test_an_export_that_is_neither_model_nor_lora_gets_no_card(tmp_path):
    (tmp_path / "line.npz").write_bytes(b"")
    add_export_cards(tmp_path, "mine", "line", shapes_vae.CONFIG, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["line.npz"]


def test_the_base_is_what_the_recipe_starts_from(tmp_path):
    assert base_of(shapes_sft.CONFIG) == "runs/shapes_base/export"
    assert base_of(configured(shapes_controller, start=tmp_path)) == str(tmp_path)
    assert base_of(shapes_controller.CONFIG) is None
    assert base_of(flux2_sft.CONFIG) is None


def test_a_run_writes_the_card_of_its_export(tmp_path):
    recipe = load_recipe(LINE)

    def task(config):
        export = partial(write_model, architecture=FLUX2_VAE, config=AutoencoderKLFlux2Config())
        return dataclasses.replace(recipe.task(config), export=lambda params, directory: export(directory / "vae"))

    config = dataclasses.replace(recipe.config, train=dataclasses.replace(recipe.config.train, steps=2))
    train(dataclasses.replace(recipe, task=task), config, tmp_path / "mine")
    text, data = card(tmp_path / "mine" / "export")
    assert data["license"] == "apache-2.0"
    assert "# mine" in text
    assert "| Recipe | `line_recipe` |" in text
    assert "| Steps | 2 |" in text
