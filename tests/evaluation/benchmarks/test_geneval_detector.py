"""GenEval's detector and CLIP on small random models: the path of the code, beside transformers' own processing."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from clvr_jax.data.preprocessing.clip_tokens import make_clip_tokenizer
from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.benchmarks.geneval import DetectorScorer, GenEval
from clvr_jax.evaluation.benchmarks.geneval_detector import (
    _SENTENCES,
    TorchDetector,
    _clip_input,
    _detector_input,
    mask_box,
    masked_crop,
)
from clvr_jax.evaluation.benchmarks.geneval_rules import COLORS, OBJECTS
from clvr_jax.evaluation.harness.images import generate_images, load_generated
from clvr_jax.evaluation.harness.scoring import score_images
from clvr_jax.files.image_io import EncodedImage, encode_png
from tests.evaluation.benchmarks.samples import GENEVAL, ColorGenerator, write_lines

DOG = OBJECTS.index("dog")
COLORED = {
    "tag": "colors",
    "include": [{"class": "dog", "count": 2, "color": "red"}],
    "prompt": "a photo of two red dogs",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Mask2Former that takes everything for dogs, and a CLIP."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    swin = transformers.SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=6, num_labels=80,
    )  # fmt: skip
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.bias[DOG] = 9.0
    model.save_pretrained(root / "detector")
    size = {"size": {"shortest_edge": 64, "longest_edge": 96}}
    (root / "detector" / "preprocessor_config.json").write_text(json.dumps(size))
    words = sorted({word for text in (*_SENTENCES, *COLORS, "dog") for word in text.split() if "{" not in word})
    tokenizer = make_clip_tokenizer(words, 16)
    tokenizer.save_pretrained(root / "clip")
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = transformers.CLIPConfig(
        text_config={**text, "vocab_size": len(tokenizer), "max_position_embeddings": 16,
                     "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id},
        vision_config={**text, "image_size": 224, "patch_size": 56}, projection_dim=8,
    )  # fmt: skip
    transformers.CLIPModel(clip).save_pretrained(root / "clip")
    return root


@pytest.fixture(scope="module")
def detector(folders):
    return TorchDetector(folders / "detector", folders / "clip", "cpu")


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_instances_are_those_of_transformers(detector, folders):
    image = Image.fromarray(noise(50, 70))
    found = detector.find(EncodedImage(encode_png(image), "png"), {**COLORED, "tag": "position", "include": []})
    assert list(found) == ["dog"]
    pixels, _ = _detector_input(image, 64, 96)
    model = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(folders / "detector").eval()
    with torch.inference_mode():
        output = model(pixel_values=torch.from_numpy(pixels))
    # Theirs take the mean over masks at another size.
    (theirs,) = transformers.Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        output, threshold=0.3, target_sizes=[(50, 70)], return_binary_maps=True
    )
    scores = sorted((segment["score"] for segment in theirs["segments_info"]), reverse=True)
    assert {segment["label_id"] for segment in theirs["segments_info"]} == {DOG}
    assert [one.confidence for one in found["dog"]] == pytest.approx(scores, abs=0.02)
    for one in found["dog"]:
        left, top, right, bottom = one.box
        assert 0 <= left < right <= 70
        assert 0 <= top < bottom <= 50


def test_colors_are_those_of_clip(detector, folders):
    picture = EncodedImage(encode_png(noise(50, 70)), "png")
    found = detector.find(picture, COLORED)["dog"]
    assert all(one.color in COLORS for one in found[:2])
    assert all(one.color is None for one in found[2:])
    # The official classifier: for each color the mean over three sentences, all of length 1.
    model = transformers.CLIPModel.from_pretrained(folders / "clip").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / "clip")
    texts = [s.format(color=c, name="dog") for c in COLORS for s in _SENTENCES]
    masks = [mask for label, _, mask in detector._instances(Image.fromarray(noise(50, 70))) if label == DOG][:2]
    crops = np.stack([
        _clip_input(masked_crop(Image.fromarray(noise(50, 70)), one.box, mask))
        for one, mask in zip(found[:2], masks, strict=True)
    ])  # fmt: skip
    with torch.inference_mode():
        output = model(**tokenizer(texts, padding=True, return_tensors="pt"), pixel_values=torch.from_numpy(crops))
    means = output.text_embeds.reshape(len(COLORS), len(_SENTENCES), -1).mean(1)
    best = (output.image_embeds @ (means / means.norm(dim=-1, keepdim=True)).T).argmax(1)
    assert [one.color for one in found[:2]] == [COLORS[index] for index in best.tolist()]


def test_what_clip_sees_is_what_its_processor_makes():
    image = Image.fromarray(noise(61, 93, seed=1))
    theirs = transformers.CLIPImageProcessorPil()(image, return_tensors="np")["pixel_values"][0]
    assert np.abs(_clip_input(image) - theirs).max() < 0.05


def test_boxes_and_crops():
    mask = np.zeros((10, 12), bool)
    mask[2:5, 3:9] = True
    mask[2, 3] = False
    assert mask_box(mask) == (3, 2, 9, 5)
    crop = masked_crop(Image.new("RGB", (12, 10), "red"), mask_box(mask), mask)
    assert crop.size == (6, 3)
    assert (crop.getpixel((0, 0)), crop.getpixel((1, 0))) == ((153, 153, 153), (255, 0, 0))


def test_scoring_records_what_was_detected_and_does_not_look_twice(detector, tmp_path):
    benchmark = GenEval()
    items = benchmark.read(write_lines(tmp_path / "prompts.jsonl", GENEVAL))
    generate_images(benchmark, items, ColorGenerator().system, tmp_path / "out", settings={}, samples=1)
    results = score_images(load_generated(benchmark, tmp_path / "out"), DetectorScorer(detector))
    assert {row["tag"] for row in results["pictures"]} == {"single_object", "counting", "colors"}
    assert results["pictures"][0]["correct"]  # a dog, of course
    assert results["pictures"][2]["reasons"] == ["expected 1 or more of cat, found 0"]
    assert results["judge"] == {"name": "detector and clip", "revision": detector.revision}

    class Blind:
        name, revision = detector.name, detector.revision

        def find(self, picture, metadata):
            raise AssertionError("looked again")

    again = score_images(load_generated(benchmark, tmp_path / "out"), DetectorScorer(Blind()))
    assert again["summary"] == results["summary"]
    path = tmp_path / "out" / "00000" / "detections" / "0000.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "found": {"dog": [{"box": 3}]}}))
    with pytest.raises(ClvrError, match="not a record of detections"):
        score_images(load_generated(benchmark, tmp_path / "out"), DetectorScorer(Blind()))


def test_other_models_are_refused(folders):
    with pytest.raises(ClvrError, match="has a clip model, GenEval's scorer needs mask2former"):
        TorchDetector(folders / "clip", folders / "clip")
    with pytest.raises(ClvrError, match=r"config\.json: no such file"):
        TorchDetector(folders / "none", folders / "clip")


@pytest.mark.parametrize(("name", "file"), [("detector", "model.safetensors"), ("clip", "tokenizer.json")])
def test_a_damaged_file_of_a_model_is_one_line(folders, tmp_path, name, file):
    models = shutil.copytree(folders, tmp_path / "models")
    for content in (b"", b"{", b"[" * 100_000):
        (models / name / file).write_bytes(content)
        with pytest.raises(ClvrError, match=f"{name}: cannot be loaded") as caught:
            TorchDetector(models / "detector", models / "clip", "cpu")
        assert "\n" not in str(caught.value)
