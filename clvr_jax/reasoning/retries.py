"""Replies that are sampled again: how many attempts share a batch."""

from collections.abc import Iterator


def retry_rounds(attempts: int) -> Iterator[range]:
    """Yields the numbers of all attempts in rounds, each with as many attempts as all rounds before it: 0, 1, 2-3, 4-7.

    The attempts of a round are sampled in one batch, and the first one that will do is taken. It is the one that would
    be taken if they were sampled one after the other, since each attempt has a seed of its own. Eight attempts take
    four calls of a model, and at most twice as many replies are sampled as are needed.

    Args:
      attempts: number of all attempts.
    """
    done = 0
    while done < attempts:
        end = min(attempts, 2 * done or 1)
        yield range(done, end)
        done = end
