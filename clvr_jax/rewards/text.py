"""A reward for text in images: the letters of quoted texts that OCR reads."""

from collections.abc import Sequence

import numpy as np
from typing_extensions import override

from clvr_jax.errors import UsageError
from clvr_jax.files.image_io import ImageLike
from clvr_jax.reasoning.verification.text_in_images import TextReader, find_text, quoted_texts, text_accuracy
from clvr_jax.rewards.reward import UNREADABLE, ImageJudge, Reward, RewardInput, Score, Scores


class TextJudge(ImageJudge):
    """Computes R_T2I in [0, 1]: the share of letters that are read, the mean over the quoted texts of a prompt.

    The part "exact" is the share of texts that are read without a mistake. A prompt that quotes no text has no score.

    Args:
      reader: reads the text in images.
    """

    def __init__(self, reader: TextReader):
        self._reader = reader

    @override
    def score_image(self, image: ImageLike, text: str) -> Score:
        wanted = quoted_texts(text)
        if not wanted:
            return UNREADABLE
        lines = self._reader.read_text(image)
        exact = [float(find_text(one, lines) is not None) for one in wanted]
        return Score(sum(text_accuracy(one, lines) for one in wanted) / len(wanted), {"exact": sum(exact) / len(exact)})


class TextReward(Reward):
    """Another reward, of which a share is that of `TextJudge` for the inputs whose text quotes something.

    The parts are those of the other reward, and "text" and "text/exact".

    Args:
      reward: the other reward; it must not run on the devices, where all processes would have to read.
      reader: reads the text in images.
      weight: the share, in (0, 1].
    Raises: UsageError for a weight out of range, and for a reward that runs on the devices.
    """

    def __init__(self, reward: Reward, reader: TextReader, weight: float):
        if not 0 < weight <= 1:
            raise UsageError(f"TextReward: weight must be in (0, 1], got {weight}")
        if reward.runs_on_devices:
            raise UsageError("TextReward: the other reward runs on the devices; give one that is served")
        self._reward, self._judge, self._weight = reward, TextJudge(reader), weight

    @override
    def scores(self, inputs: Sequence[RewardInput]) -> Scores:
        other = self._reward.scores(inputs)
        read = Scores.stack([self._judge.score_image(item.image, item.proxies.p_t2i) for item in inputs])
        mixed = (1 - self._weight) * other.values + self._weight * read.values
        values = np.where(np.isnan(read.values), other.values, mixed)
        return Scores(values, {**other.parts, "text": read.values, **{f"text/{k}": v for k, v in read.parts.items()}})
