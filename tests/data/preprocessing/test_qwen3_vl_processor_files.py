"""The image processor of Qwen3-VL in the files of transformers 4 and 5."""

import json

import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from clvr_jax.data.preprocessing.qwen3_vl_images import Qwen3VLImageProcessor, load_processor, processor_to_dict
from clvr_jax.errors import ClvrError

OURS = Qwen3VLImageProcessor(patch_size=8, min_pixels=4096, max_pixels=65_536, image_mean=(0.1, 0.2, 0.3))


def test_both_layouts_are_read_with_the_nested_one_first(tmp_path):
    flat, nested = tmp_path / "preprocessor_config.json", tmp_path / "processor_config.json"
    with pytest.raises(ClvrError, match=r"neither preprocessor_config\.json nor processor_config\.json"):
        load_processor(tmp_path)
    flat.write_text(json.dumps(processor_to_dict(OURS)))
    assert load_processor(tmp_path) == OURS
    theirs = Qwen2VLImageProcessorPil.from_pretrained(str(tmp_path))  # transformers 5 reads our files
    assert (theirs.patch_size, list(theirs.image_mean)) == (8, [0.1, 0.2, 0.3])
    nested.write_text(json.dumps({"processor_class": "Qwen3VLProcessor"}))
    assert load_processor(tmp_path) == OURS
    nested.write_text(json.dumps({"image_processor": {**processor_to_dict(OURS), "patch_size": 16}}))
    assert load_processor(tmp_path).patch_size == 16
    assert Qwen2VLImageProcessorPil.from_pretrained(str(tmp_path)).patch_size == 16
    flat.unlink()
    assert load_processor(tmp_path).patch_size == 16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": "8"}, "patch_size must be an integer"),
        ({"patch_size": 10**9}, "patch_size must be an integer from 1 to 4096"),
        ({"size": 3}, "size must be a JSON object"),
        ({"size": {"shortest_edge": -1, "longest_edge": 3}}, "shortest_edge must be an integer"),
        ({"image_mean": 0.5}, "image_mean is 0.5; it must be a list"),
        ({"image_std": [0.5, "x", 0.5]}, r"image_std\[1\] must be a number"),
        ({"rescale_factor": "x"}, "rescale_factor must be a number"),
    ],
)
def test_errors_of_invalid_values_name_the_field(tmp_path, fields, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**processor_to_dict(OURS), **fields}))
    with pytest.raises(ClvrError, match=message) as caught:
        load_processor(tmp_path)
    assert str(tmp_path) in str(caught.value)
