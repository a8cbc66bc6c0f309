"""Chunked cross entropy: the loss of a language model without the logits of all its tokens at once.

Logits are the largest array of a step: 8192 tokens with a vocabulary of 151,936 are 5 GB in float32, and their gradient
as much again. Here each device computes the logits of its own tokens block by block, and the backward pass computes
those of a block again.
"""

import math

import jax
import jax.numpy as jnp

from clvr_jax.sharding import active_layout, with_logical_constraint


def next_token_loss_in_blocks(
    states_bkd: jax.Array, head_dv: jax.Array, targets_bk: jax.Array, weights_bk: jax.Array, block: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the cross entropy of tokens from the final states before them, averaged over the tokens to be learned.

    Args:
      states_bkd: final states; states @ head are logits.
      head_dv: matrix to the vocabulary.
      targets_bk: int32, the token that follows each state.
      weights_bk: 1 at tokens to be learned, 0 elsewhere.
      block: number of tokens whose float32 logits each device holds at a time.
    Returns: as `objectives.next_token_loss`, equal to it up to rounding; a prediction that ties with the likeliest
      counts as right.
    """
    rows, columns = _parts(states_bkd.shape[:2])
    sizes = states_bkd.shape[0] // rows, states_bkd.shape[1] // columns
    block = min(block, math.prod(sizes))

    def shard(x_bk: jax.Array) -> jax.Array:
        """(b, k, ...) -> (blocks, rows of devices, columns of devices, block, ...): no token moves."""
        rest = x_bk.shape[2:]
        own = x_bk.reshape(rows, sizes[0], columns, sizes[1], *rest).swapaxes(1, 2)
        own = own.reshape(rows, columns, math.prod(sizes), *rest)
        filled = jnp.pad(own, [(0, 0), (0, 0), (0, -own.shape[2] % block), *[(0, 0)] * len(rest)])
        blocks = jnp.moveaxis(filled.reshape(rows, columns, -1, block, *rest), 2, 0)
        return with_logical_constraint(blocks, None, "batch", "tokens", *[None] * (1 + len(rest)))

    # A matrix for each device, whose gradients are summed after all blocks: one matrix for all devices would be
    # gathered, and its gradient summed over the devices, at every block. It is sent in its own dtype; the blocks are
    # summed in float32.
    head_rcdv = jnp.broadcast_to(head_dv.astype(states_bkd.dtype), (rows, columns, *head_dv.shape))
    head_rcdv = with_logical_constraint(head_rcdv, "batch", "tokens", None, "vocab").astype(jnp.float32)

    def add(sums: tuple[jax.Array, jax.Array], part: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, jax.Array], None]:
        states_rcnd, targets_rcn, weights_rcn = part
        logits_rcnv = jnp.einsum(
            "rcnd,rcdv->rcnv",
            states_rcnd,
            head_rcdv.astype(states_rcnd.dtype),
            preferred_element_type=jnp.float32,
        )
        logits_rcnv = with_logical_constraint(logits_rcnv, "batch", "tokens", None, "vocab")
        # By comparison and not by index: the vocabulary may be sharded.
        is_target = jnp.arange(logits_rcnv.shape[-1]) == targets_rcn[..., None]
        picked_rcn = jnp.where(is_target, logits_rcnv, 0).sum(axis=-1)
        losses_rcn = jax.nn.logsumexp(logits_rcnv, axis=-1) - picked_rcn
        is_right_rcn = picked_rcn >= jax.lax.stop_gradient(logits_rcnv).max(axis=-1)
        new = ((counted * weights_rcn).sum(axis=-1) for counted in (losses_rcn, is_right_rcn))
        return (sums[0] + next(new), sums[1] + next(new)), None

    parts = (shard(states_bkd), shard(targets_bk), shard(weights_bk.astype(jnp.float32)))
    zeros_rc = jnp.zeros((rows, columns))
    (loss_rc, right_rc), _ = jax.lax.scan(jax.checkpoint(add, prevent_cse=False), (zeros_rc, zeros_rc), parts)
    count = jnp.maximum(weights_bk.sum(), 1)
    return loss_rc.sum() / count, {"token_accuracy": right_rc.sum() / count, "weight": count}


def _parts(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the number of shards of rows and of tokens."""
    layout = active_layout()
    if layout is None:
        return 1, 1
    own = layout.sharding(("batch", "tokens"), shape).shard_shape(shape)
    return shape[0] // own[0], shape[1] // own[1]
