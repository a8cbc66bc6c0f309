"""Replies that are sampled again: at which temperature, and how many attempts share a batch."""

from collections.abc import Iterator

RETRY_TEMPERATURE = 0.7


def temperature_of(attempt: int, highest: float = 1.0) -> float:
    """Returns the temperature of an attempt: 0 of the first, 0.7 of the second, then 0.1 more for each.

    A model that is sure of a wrong reply samples it again at a low temperature, however often.

    Args:
      attempt: number of replies before this one that could not be used.
      highest: the temperature of all later attempts.
    """
    return min(round(RETRY_TEMPERATURE + 0.1 * (attempt - 1), 1), highest) if attempt else 0.0


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
