import dataclasses
import json

import pytest
from huggingface_hub import ModelCard

from clvr_jax.convert.architectures import AUTOENCODER_KL, FLUX2_TRANSFORMER, FLUX2_VAE, QWEN3, QWEN3_VL, UNET
from clvr_jax.convert.model_card import (
    APACHE,
    FLUX_NON_COMMERCIAL,
    OF_SOURCE,
    OPEN_RAIL_M,
    OPEN_RAIL_PLUS_PLUS_M,
    Provenance,
    add_model_card,
    license_of,
    license_of_all,
    model_card,
)
from clvr_jax.models.flux2 import AutoencoderKLFlux2Config, Flux2TransformerConfig
from clvr_jax.models.qwen3 import Qwen3Config
from clvr_jax.models.qwen3_vl import Qwen3VLConfig
from clvr_jax.models.stable_diffusion import AutoencoderKLConfig, UNet2DConditionConfig
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.registry import SHIPPED
from clvr_jax.scripts.shapes_assemble import shipped_card

MADE = Provenance("/models/flux", "clvr convert /models/flux out --to jax", "0.1.0", "jax")


def model(architecture, config):
    """As a config.json read from a file: lists, no tuples."""
    return architecture.torch_class, json.loads(json.dumps(architecture.config_to_dict(config)))


KLEIN_4B = model(FLUX2_TRANSFORMER, Flux2TransformerConfig.klein_4b())
KLEIN_9B = model(FLUX2_TRANSFORMER, Flux2TransformerConfig.klein_9b())
SDXL = model(UNET, UNet2DConditionConfig.sdxl())
VAE = model(FLUX2_VAE, AutoencoderKLFlux2Config())
TEXT_ENCODER = model(QWEN3, Qwen3Config.qwen3_8b())
CONTROLLER = model(QWEN3_VL, Qwen3VLConfig.qwen3_vl_2b())
SHIPPED_TRANSFORMER = (
    FLUX2_TRANSFORMER.torch_class,
    json.loads((SHIPPED / "shapes-tiny" / "transformer" / "config.json").read_text()),
)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (KLEIN_4B, APACHE),
        (KLEIN_9B, FLUX_NON_COMMERCIAL),
        (model(FLUX2_TRANSFORMER, Flux2TransformerConfig.dev()), FLUX_NON_COMMERCIAL),
        ((FLUX2_TRANSFORMER.torch_class, {}), FLUX_NON_COMMERCIAL),  # a silent config.json is dev's
        (SHIPPED_TRANSFORMER, OF_SOURCE),
        (VAE, APACHE),
        (SDXL, OPEN_RAIL_PLUS_PLUS_M),
        (model(UNET, UNet2DConditionConfig.sd15()), OPEN_RAIL_M),
        (model(UNET, dataclasses.replace(UNet2DConditionConfig.sd15(), cross_attention_dim=1024)), OF_SOURCE),
        (model(QWEN3, Qwen3Config.qwen3_4b()), APACHE),
        (TEXT_ENCODER, APACHE),
        (model(QWEN3_VL, Qwen3VLConfig.qwen3_vl_4b()), APACHE),
        (model(QWEN3_VL, Qwen3VLConfig.qwen3_vl_8b()), APACHE),
        (model(AUTOENCODER_KL, AutoencoderKLConfig()), OF_SOURCE),
        (("Mistral3ForConditionalGeneration", {"hidden_size": 4096}), OF_SOURCE),
    ],
)
def test_published_sizes_have_their_license(found, expected):
    assert license_of(*found) is expected


def test_settings_that_may_change_do_not_lift_a_license():
    torch_class, config = KLEIN_9B
    assert license_of(torch_class, {**config, "rope_theta": 1e4, "eps": 1e-5}) is FLUX_NON_COMMERCIAL


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ({"text_encoder": TEXT_ENCODER, "transformer": KLEIN_9B, "vae": VAE}, FLUX_NON_COMMERCIAL),
        ({"transformer": KLEIN_4B, "transformer_other": KLEIN_9B}, FLUX_NON_COMMERCIAL),
        ({"text_encoder": TEXT_ENCODER, "transformer": KLEIN_4B, "vae": VAE}, APACHE),
        ({"text_encoder": TEXT_ENCODER, "transformer": SHIPPED_TRANSFORMER}, OF_SOURCE),
        ({"text_encoder": ("CLIPTextModel", {}), "unet": SDXL}, OPEN_RAIL_PLUS_PLUS_M),
        ({".": TEXT_ENCODER}, APACHE),
        ({}, OF_SOURCE),
    ],
)
def test_a_folder_is_bound_by_what_draws_and_by_any_non_commercial_part(models, expected):
    assert license_of_all(models) is expected


def test_a_card_says_what_the_hub_and_people_look_for():
    made = Provenance(
        source="black-forest-labs/FLUX.2-klein-9B@main",
        command="clvr convert A B --to torch --dtype bfloat16",
        version="0.1.0",
        format="torch",
        revision="1234567",
        dtype="bfloat16",
        recipe="configs/clvr_sft.py | seed 3",
    )
    text = model_card("my-9b", made, {"transformer": KLEIN_9B, "vae": VAE})
    data = ModelCard(text).data.to_dict()
    assert data == {
        "license": "other",
        "license_name": "flux-non-commercial-license",
        "license_link": FLUX_NON_COMMERCIAL.link,
        "base_model": "black-forest-labs/FLUX.2-klein-9B",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["clvr-jax", "text-to-image"],
    }
    assert "\n# my-9b\n\nFLUX.2 transformer, FLUX.2 autoencoder.\n" in text
    assert "**FLUX Non-Commercial License: the weights and all that derives" in text
    assert "| Source | `black-forest-labs/FLUX.2-klein-9B@main`, revision `1234567` |" in text
    assert "| Made by | `clvr convert A B --to torch --dtype bfloat16` |" in text
    assert "| clvr-jax | 0.1.0 |" in text
    assert "| Numbers | bfloat16 |" in text
    assert r"| Recipe | `configs/clvr_sft.py \| seed 3` |" in text
    assert "| `transformer` | FLUX.2 transformer | FLUX Non-Commercial License |" in text
    assert "| `vae` | FLUX.2 autoencoder | Apache-2.0 |" in text


def test_a_card_of_a_path_names_no_base_model_and_no_recipe_if_there_is_none():
    text = model_card("out", MADE, {"transformer": SHIPPED_TRANSFORMER})
    data = ModelCard(text).data.to_dict()
    assert data == {
        "license": "other",
        "license_name": "license-of-the-source",
        "library_name": "clvr-jax",
        "pipeline_tag": "text-to-image",
        "tags": ["clvr-jax", "text-to-image", "jax"],
    }
    assert "Recipe" not in text
    assert text.endswith("\n## License\n\nThe license of the source holds.\n")


@pytest.mark.parametrize(
    ("models", "library"), [({".": TEXT_ENCODER}, "transformers"), ({"vae": VAE, "text": TEXT_ENCODER}, "diffusers")]
)
def test_the_library_is_that_which_reads_the_layout(models, library):
    data = ModelCard(model_card("x", dataclasses.replace(MADE, format="torch"), models)).data
    assert data.library_name == library
    assert data.license == "apache-2.0"


@pytest.mark.parametrize(
    ("models", "task"),
    [
        ({"transformer": KLEIN_4B, "vae": VAE, "controller": CONTROLLER}, "text-to-image"),
        ({".": SDXL}, "text-to-image"),
        ({".": CONTROLLER}, "image-text-to-text"),
        ({".": TEXT_ENCODER}, "text-generation"),
        ({"vae": VAE}, None),
    ],
)
def test_the_hub_lists_a_model_by_its_task(models, task):
    assert ModelCard(model_card("x", MADE, models)).data.pipeline_tag == task


def test_training_from_a_model_of_the_hub_names_it_and_the_steps():
    made = dataclasses.replace(
        MADE, source="org/base@main", recipe="flux2_sft", steps=1500, base_model="org/base", relation="finetune"
    )
    text = model_card("x", made, {"transformer": KLEIN_4B})
    data = ModelCard(text).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "finetune")
    assert "| Steps | 1,500 |" in text


def test_models_that_are_not_published_may_have_a_license_of_their_own():
    models = {"transformer": SHIPPED_TRANSFORMER}
    text = model_card("x", MADE, models, APACHE)
    assert ModelCard(text).data.license == "apache-2.0"
    assert "| `transformer` | FLUX.2 transformer | Apache-2.0 |" in text
    assert "It was recognized by the sizes" not in text
    assert ModelCard(model_card("x", MADE, {**models, "other": KLEIN_9B}, APACHE)).data.license == "other"


def test_the_shipped_directory_has_the_card_that_its_script_writes():
    directory = SHIPPED / "shapes-tiny"
    text = (directory / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "diffusers", "text-to-image")
    parts = {path.parent.name for path in directory.glob("*/config.json")}
    assert parts >= {"controller", "transformer", "transformer_base", "transformer_sft", "vae"}
    assert all(f"| `{part}` | " in text for part in parts)
    stated = next(line for line in text.splitlines() if line.startswith("| clvr-jax |"))
    written = shipped_card(directory, "shapes-tiny").splitlines()
    assert [stated if line.startswith("| clvr-jax |") else line for line in written] == text.splitlines()


def test_a_readme_of_the_source_is_kept(tmp_path):
    assert add_model_card(tmp_path, "ours\n")
    assert (tmp_path / "README.md").read_text() == "ours\n"
    assert not add_model_card(tmp_path, "another\n")
    assert (tmp_path / "README.md").read_text() == "ours\n"


def test_a_pipeline_that_is_saved_carries_a_card(tmp_path):
    Flux2Pipeline.from_pretrained("shapes-tiny").save_pretrained(str(tmp_path / "mine"), dtype="float16")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "# mine" in card
    assert "`Flux2Pipeline.save_pretrained`" in card
    for part in ("transformer", "vae", "text_encoder"):
        assert f"`{part}`" in card
