"""Calls the public functions of models, diffusion and RL with their annotations checked; run by `test_array_types`.

The checks are installed while the modules are imported, so they need a process of their own. Models are traced, not
compiled or run, so published sizes cost no more than small ones where all layers are one scan. Prints JSON: the
name of each call -> None, or the error.
"""

import json
from collections.abc import Callable
from typing import Any

from jaxtyping import install_import_hook

import tests.annotation_checker  # noqa: F401 - the hook finds it as an attribute of `tests`

if __name__ == "__main__":
    with install_import_hook(
        ["clvr_jax.diffusion", "clvr_jax.models", "clvr_jax.rl", "clvr_jax.training.objectives.losses"],
        "tests.annotation_checker.check",
    ):
        import jax
        import jax.numpy as jnp
        import numpy as np

        from clvr_jax import diffusion
        from clvr_jax.models.common.abstract import ShapeRngs
        from clvr_jax.models.common.adapters import KernelAdapter, WeightAdapter, kernel_delta
        from clvr_jax.models.common.attention import attention
        from clvr_jax.models.common.decoding import generate
        from clvr_jax.models.common.lora import LoRAConfig
        from clvr_jax.models.common.quantization import quantize_layers
        from clvr_jax.models.common.sampling import Sampling
        from clvr_jax.models.flux2 import (
            AutoencoderKLFlux2,
            AutoencoderKLFlux2Config,
            Flux2Transformer,
            Flux2TransformerConfig,
        )
        from clvr_jax.models.flux2.position_ids import latent_ids, reference_ids, text_ids
        from clvr_jax.models.qwen3 import Qwen3, Qwen3Config
        from clvr_jax.models.qwen3.layers import empty_cache
        from clvr_jax.models.qwen3_vl import Qwen3VL, Qwen3VLConfig
        from clvr_jax.models.qwen3_vl.positions import Conversation, batch_conversations
        from clvr_jax.models.stable_diffusion import (
            AutoencoderKL,
            AutoencoderKLConfig,
            CLIPText,
            CLIPTextConfig,
            UNet2DCondition,
            UNet2DConditionConfig,
        )
        from clvr_jax.rl import DiffusionNFT, DiffusionPolicy, FlowGRPO, GRPOConfig, NFTConfig, group_advantages
        from clvr_jax.rl.algorithms import Predictors
        from clvr_jax.training.objectives import losses as objectives

    B, DTYPES = 2, {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    KEY, NOISE = jax.random.key(0), jnp.ones((B, 6, 4))
    VALUES = jnp.arange(B, dtype=jnp.float32) / B
    IMAGE_TOKEN = 5

    def zeros(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jnp.zeros(shape, dtype)

    def ids(*shape: int) -> Any:
        return zeros(*shape, dtype=jnp.int32)

    def flux2() -> Any:
        model = Flux2Transformer(Flux2TransformerConfig.klein_4b(), rngs=ShapeRngs(), **DTYPES)
        tokens = np.concatenate([latent_ids(4, 4), reference_ids([(2, 3)])])
        inputs = zeros(B, 22, 128), zeros(B, 7, 7680), zeros(B)
        return model(*inputs, tokens, text_ids(7), mask_bt=jnp.ones((B, 29), bool), return_hidden_states=True)

    def flux2_quantized() -> Any:
        config = Flux2TransformerConfig(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(4, 4, 4, 4),
        )
        model = quantize_layers(Flux2Transformer(config, rngs=ShapeRngs(), **DTYPES))
        references = zeros(B, 6, 128), reference_ids([(2, 3)]), zeros(B)
        cached = [model.reference_cache(*references, quantize=each) for each in (False, True)]
        inputs = zeros(B, 16, 128), zeros(B, 7, 24), zeros(B), latent_ids(4, 4)[None], text_ids(7), zeros(B)
        return model(*inputs), model(*inputs, cached=cached)

    def qwen3() -> Any:
        model = Qwen3(Qwen3Config.qwen3_4b(), rngs=ShapeRngs(), **DTYPES)
        cache = empty_cache(model.config, model.config.num_hidden_layers, B, 9, jnp.bfloat16)
        masked = model(ids(B, 5), jnp.ones((B, 5), bool)), model(ids(B, 5), positions_bt=ids(B, 5))
        return masked, model.hidden_states(ids(B, 5), ids(B, 5)), model.decode(ids(B, 5), cache, ids(B), keys=7)

    def qwen3_vl() -> Any:
        model = Qwen3VL(Qwen3VLConfig.qwen3_vl_2b(), rngs=ShapeRngs(), **DTYPES)
        grids = ((1, 4, 6),)
        token = model.config.image_token_id
        patches = np.zeros((24, model.config.vision.patch_features), np.float32)
        rows = [Conversation([1] + [token] * 6 + [2], patches, grids), Conversation([1, 2])]
        batch = batch_conversations(rows, image_token_id=token, merge=2, length_multiple=4)
        arrays = {name: value if name == "grid_thw" else jnp.asarray(value) for name, value in batch.items()}
        logits = model(**arrays, logits_at_bk=ids(B, 3))
        options = {"temperature": 0.7, "key": KEY, "sampling": Sampling(5, 0.9, 1.1), "top_logprobs": 3}
        return logits, model.hidden_states(**arrays), generate(model, arrays, max_new_tokens=4, **options)

    def clip() -> Any:
        return CLIPText(CLIPTextConfig.open_clip_vit_bigg(), rngs=ShapeRngs(), **DTYPES)(ids(B, 77), clip_skip=1)

    def unet() -> Any:
        config = UNet2DConditionConfig(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=24,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
            time_cond_proj_dim=12,
        )
        model = UNet2DCondition(config, rngs=ShapeRngs(), **DTYPES)
        conditions = {"text_embeds_bd": zeros(B, 16), "time_ids_b6": ids(B, 6), "timestep_cond_bd": zeros(B, 12)}
        return model(zeros(B, 7, 9, 4), ids(B), zeros(B, 5, 24), **conditions)

    def autoencoders() -> Any:
        kl = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(32, 64)), rngs=ShapeRngs(), **DTYPES)
        flux2_config = AutoencoderKLFlux2Config(block_out_channels=(32, 64), layers_per_block=1)
        autoencoder = AutoencoderKLFlux2(flux2_config, rngs=ShapeRngs(), **DTYPES)
        images = zeros(B, 8, 12, 3)
        loss = objectives.autoencoder_loss(kl.moments, kl.decode, images, KEY, 0.1)
        tokens = autoencoder.decode_tokens(autoencoder.encode_tokens(images))
        return kl.decode_scaled(kl.encode_scaled(images)), tokens, loss

    def attentions() -> Any:
        query, key = zeros(B, 5, 6, 8), zeros(B, 7, 2, 8)
        plain = attention(query, key, key, mask=jnp.ones((1, 1, 5, 7), bool))
        return plain, attention(query, key, key, key_mask_bk=ids(B, 7), is_causal=True)

    def adapters() -> Any:
        tensors = {"lora_down": zeros(2, 6), "lora_up": zeros(8, 2)}
        adapter = KernelAdapter((WeightAdapter(tensors, (8, 6), 1.0, (0, 8)),))
        lora = LoRAConfig(rank=2, alpha=4).init({"layers": {"kernel": zeros(3, 6, 8)}}, KEY)
        return kernel_delta(adapter, zeros(6, 8)), kernel_delta(lora["layers"]["kernel"], zeros(3, 6, 8))

    def flow() -> Any:
        sigmas = diffusion.flow_sigmas(2, 16)
        guided = diffusion.classifier_free_guidance(lambda x, sigma, c: x * c, zeros(B, 1, 1), zeros(B, 1, 1), 2.0)
        losses = objectives.flow_matching_loss(lambda x, t: x, NOISE, KEY, 3.0)
        return diffusion.euler_solve(guided, NOISE, sigmas), losses

    def noise_prediction() -> Any:
        schedule = diffusion.NoiseSchedule()
        predict = lambda x, timestep: x  # noqa: E731
        solved = (
            diffusion.euler_noise_solve(predict, NOISE, schedule, schedule.euler_timesteps(3)),
            diffusion.ddim_solve(predict, NOISE, schedule, schedule.ddim_timesteps(3)),
            diffusion.lcm_solve(predict, NOISE, schedule, schedule.lcm_timesteps(3), key=KEY),
            diffusion.lcm_solve(predict, NOISE, schedule, schedule.lcm_timesteps(3), step_noise=jnp.ones((2, B, 6, 4))),
        )
        process = diffusion.VariancePreservingProcess(schedule)
        noisy = process.corrupt(NOISE, NOISE, ids(B))
        return (
            solved,
            process.predict_x0(noisy, NOISE, ids(B)),
            objectives.noise_prediction_loss(predict, NOISE, KEY, schedule),
        )

    def tokens() -> Any:
        return objectives.next_token_loss(zeros(B, 5, 9), ids(B, 5), jnp.ones((B, 5)))

    def rl() -> Any:
        policy = DiffusionPolicy(
            encode_conditions=lambda frozen, data: data,
            predictor=lambda weights, conditions: lambda x, t: x,
            solve=lambda predictor, noise: noise,
            decode=lambda frozen, latents: latents,
            latent_shape=(6, 4),
            timesteps=np.float32([1.0, 0.5]),
            forward_process=diffusion.FlowProcess(),
        )
        advantages = group_advantages([0.0, 1.0], [0, 0])
        predictors = Predictors(*[policy.predictor(None, None)] * 3)
        keys, losses = jax.random.split(KEY, B), []
        for algorithm in (DiffusionNFT(policy, NFTConfig(), "linear"), FlowGRPO(policy, GRPOConfig())):
            samples = algorithm.sample(predictors.old, NOISE, keys)
            weights = algorithm.sample_weights(advantages.values)
            arguments = samples, weights, jnp.asarray(advantages.valid_mask), ids(B), keys
            losses.append(algorithm.loss(predictors, *arguments))
            algorithm.final_latents(samples)
        return losses

    def refused(call: Callable[[], Any]) -> Callable[[], Any]:
        """Returns a call that fails unless the check refuses `call`."""

        def expect_error() -> None:
            try:
                call()
            except Exception as error:
                if type(error).__name__ != "TypeCheckError":
                    raise
                return
            raise AssertionError("a wrong shape was not refused")

        return expect_error

    CALLS: dict[str, Callable[[], Any]] = {
        function.__name__: function
        for function in (
            *(flux2, flux2_quantized, qwen3, qwen3_vl, clip, unet, autoencoders, attentions, adapters),
            *(flow, noise_prediction, tokens, rl),
        )
    }
    CALLS |= {
        "keys of another head_dim": refused(
            lambda: attention(zeros(B, 5, 6, 8), zeros(B, 7, 2, 4), zeros(B, 7, 2, 4))  # type: ignore[arg-type]
        ),
        "float token ids": refused(lambda: objectives.next_token_loss(zeros(B, 5, 9), zeros(B, 5), jnp.ones((B, 5)))),
        "noise of another batch": refused(
            lambda: diffusion.FlowProcess().corrupt(NOISE, NOISE[:1], VALUES)  # would broadcast
        ),
    }

    def outcome(call: Callable[[], Any]) -> str | None:
        try:
            jax.eval_shape(call)
        except Exception as error:  # noqa: BLE001 - reported to the test
            return f"{type(error).__name__}: {error}"
        return None

    print(json.dumps({name: outcome(call) for name, call in CALLS.items()}))
