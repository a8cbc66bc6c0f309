"""Supervised fine-tuning: losses on the images and texts of a trajectory; they take functions and know no model."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from clvr_jax.training.objectives.losses import flow_matching_loss
from clvr_jax.training.objectives.token_loss import next_token_loss_in_blocks

Field = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(latents (b, t, c), timesteps (b,), text (b, s, d)) -> velocity (b, t, c)."""


def drawing_loss(
    encode_text: Callable[[jax.Array, jax.Array], jax.Array],
    encode_images: Callable[[jax.Array], jax.Array],
    field: Callable[[jax.Array], Field],
    data: Mapping[str, jax.Array],
    key: jax.Array,
    shift: float,
) -> jax.Array:
    """Computes the flow-matching loss of the next image, given all earlier texts and images.

    Args:
      encode_text: (ids, mask), each (b, s) -> (b, s, d).
      encode_images: in [-1, 1], (b, h, w, 3) -> latent tokens (b, t, c).
      field: tokens of all references (b, references * t, c) -> the velocity beside them.
      data: ids and mask; target (b, h, w, 3) and references (b, n, h, w, 3), uint8, of one size.
      key: for noise and timesteps. shift: see `sample_timesteps`.
    Returns: scalar, float32.
    Source: supervised fine-tuning of CLVR (arXiv 2605.14876): condition c_t, target x_t.
    """
    text_bsd = encode_text(data["ids"], data["mask"])
    images = jnp.concatenate([data["target"][:, None], data["references"]], axis=1)
    tokens_bntc = _encode_all(encode_images, images)
    x0_btc, references_bntc = tokens_bntc[:, 0], tokens_bntc[:, 1:]
    velocity = field(references_bntc.reshape(x0_btc.shape[0], -1, x0_btc.shape[-1]))
    return flow_matching_loss(lambda x, t: velocity(x, t, text_bsd), x0_btc, key, shift)


def packed_drawing_loss(
    encode_text: Callable[[jax.Array, jax.Array], jax.Array],
    encode_images: Callable[[jax.Array], jax.Array],
    field: Callable[[jax.Array], Field],
    data: Mapping[str, jax.Array],
    key: jax.Array,
    shift: float,
) -> jax.Array:
    """Computes the flow-matching loss of several images of each trajectory, which share their references.

    Args:
      encode_text, encode_images: see `drawing_loss`.
      field: tokens of all references of b trajectories (b, references * t, c) -> the velocity of all targets, those of
        a trajectory one after the other.
      data: ids and mask (b, n, s); target (b, n, h, w, 3) and references (b, r, h, w, 3), uint8, of one size.
      key, shift: see `drawing_loss`.
    Returns: scalar, float32, the mean over all targets.
    """
    rows = len(data["ids"])
    ids, mask = (data[name].reshape(-1, data[name].shape[-1]) for name in ("ids", "mask"))
    text_bsd = encode_text(ids, mask)
    x0_bntc = _encode_all(encode_images, data["target"])
    references_brtc = _encode_all(encode_images, data["references"]) if data["references"].shape[1] else x0_bntc[:, :0]
    velocity = field(references_brtc.reshape(rows, -1, x0_bntc.shape[-1]))
    x0_btc = x0_bntc.reshape(-1, *x0_bntc.shape[2:])
    return flow_matching_loss(lambda x, t: velocity(x, t, text_bsd), x0_btc, key, shift, shuffle=True)


def _encode_all(encode_images: Callable[[jax.Array], jax.Array], images_bnhwc: jax.Array) -> jax.Array:
    """Encodes n uint8 images of each row to latent tokens (b, n, t, c), without a gradient."""

    def encode(images_bhwc: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(encode_images(images_bhwc.astype(jnp.float32) / 127.5 - 1))

    # One image of every row after the other: the encoder needs more memory for large images than everything else.
    tokens_nbtc: jax.Array = jax.lax.map(encode, images_bnhwc.swapaxes(0, 1))
    return tokens_nbtc.swapaxes(0, 1)


def conversation_loss(
    states_btd: jax.Array, head_dv: jax.Array, data: Mapping[str, jax.Array], block: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the cross entropy of the assistant's tokens; no logits are computed for tokens that are only read.

    Args:
      states_btd: final states of the language model; states @ head are logits.
      head_dv: matrix to the vocabulary.
      data: input_ids_bt; weights_bt, 1 at tokens to be learned; learned_bk, their positions, padded with 0.
      block: see `next_token_loss_in_blocks`.
    Returns: as `objectives.next_token_loss`.
    Source: supervised fine-tuning of CLVR (arXiv 2605.14876), the controller's reasoning and actions.
    """
    learned_bk = data["learned_bk"]
    before_bk1 = jnp.maximum(learned_bk - 1, 0)[..., None]
    return next_token_loss_in_blocks(
        jnp.take_along_axis(states_btd, before_bk1, axis=1),
        head_dv,
        jnp.take_along_axis(data["input_ids_bt"], learned_bk, axis=1),
        jnp.take_along_axis(data["weights_bt"], learned_bk, axis=1),
        block,
    )
