"""Generates images and a reply on a mesh over two processes; process 0 saves them. `test_processes.py` starts it."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from clvr_jax.errors import UsageError
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
from clvr_jax.pipelines.sdxl import SDXLPipeline
from clvr_jax.processes import check_same, is_host0, run_on_all
from clvr_jax.sharding import MeshConfig
from clvr_jax.training.distributed import Cluster

MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a red circle"}]}]
PHOTO = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


def results(flux2, sdxl, qwen3_vl, mesh=None):
    """Images of FLUX.2 with a reference, latents of SDXL, and a reply of Qwen3-VL that is sampled at a temperature."""
    flux = Flux2Pipeline.from_pretrained(flux2, mesh=mesh)
    given = {"height": 32, "width": 48, "num_inference_steps": 2, "guidance_scale": 1.0}
    images = flux(["a red circle", "a"], [Image.fromarray(PHOTO)], output_type="np", **given).images
    pipeline = SDXLPipeline.from_pretrained(sdxl, mesh=mesh)
    latents = pipeline("a red circle", num_inference_steps=1, guidance_scale=1.0, output_type="latent").images
    chat = Qwen3VLPipeline.from_pretrained(qwen3_vl, mesh=mesh)
    (reply,) = chat.answer_all([MESSAGES], [[PHOTO]], 3, 0.7, [3], top_logprobs=2)
    logprobs = np.array([token.logprob for token in reply.tokens])
    return {"images": images, "latents": latents, "text": np.array(reply.text), "logprobs": logprobs}


def error_of(run):
    try:
        run()
    except UsageError as error:
        return str(error)
    return ""


def fail_in_process_1():
    if not is_host0():
        raise UsageError("only process 1 fails")


def main(coordinator, process, out, *models):
    Cluster(coordinator, 2, int(process)).initialize()
    found = results(*models, mesh=MeshConfig(fsdp=1, tensor=2))
    if is_host0():
        np.savez(Path(out) / "results.npz", **found)
    errors = [
        error_of(lambda: run_on_all(fail_in_process_1)),
        error_of(lambda: check_same("prompts", process)),
        error_of(MeshConfig(devices=1).make),
    ]
    (Path(out) / f"errors{process}").write_text("\n".join(errors))


if __name__ == "__main__":
    main(*sys.argv[1:])
