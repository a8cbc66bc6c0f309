"""The configuration of Qwen3-VL, and those of the published models."""

import dataclasses

from clvr_jax.errors import ClvrError
from clvr_jax.models.qwen3_vl.vision import Qwen3VLVisionConfig


@dataclasses.dataclass(frozen=True)
class Qwen3VLTextConfig:
    """Configuration of the language model, with the fields of transformers' `text_config` and defaults of the 8B model.

    mrope_section: number of frequencies for time, row and column; the sum is head_dim / 2.
    """

    vocab_size: int = 151_936
    hidden_size: int = 4096
    intermediate_size: int = 12_288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5_000_000.0
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    attention_bias: bool = False
    max_position_embeddings: int = 262_144

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ClvrError(
                f"Qwen3-VL text: num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.head_dim:
            raise ClvrError(
                f"Qwen3-VL text: mrope_section {self.mrope_section} must be three numbers that sum to half of "
                f"head_dim {self.head_dim}"
            )


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig:
    """Configuration of both models and the ids of image tokens; the defaults are those of Qwen3-VL-8B."""

    text: Qwen3VLTextConfig = dataclasses.field(default_factory=Qwen3VLTextConfig)
    vision: Qwen3VLVisionConfig = dataclasses.field(default_factory=Qwen3VLVisionConfig)
    tie_word_embeddings: bool = False
    image_token_id: int = 151_655
    video_token_id: int = 151_656
    vision_start_token_id: int = 151_652
    vision_end_token_id: int = 151_653

    def __post_init__(self) -> None:
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ClvrError(
                f"Qwen3-VL: vision out_hidden_size {self.vision.out_hidden_size} must equal text hidden_size "
                f"{self.text.hidden_size}"
            )
        if len(self.vision.deepstack_visual_indexes) > self.text.num_hidden_layers:
            raise ClvrError("Qwen3-VL: more DeepStack features than language layers")

    @classmethod
    def qwen3_vl_8b(cls) -> "Qwen3VLConfig":
        """Returns Qwen/Qwen3-VL-8B-Instruct."""
        return cls()

    @classmethod
    def qwen3_vl_4b(cls) -> "Qwen3VLConfig":
        """Returns Qwen/Qwen3-VL-4B-Instruct."""
        text = Qwen3VLTextConfig(hidden_size=2560, intermediate_size=9728)
        return cls(text=text, vision=_small_vision(2560), tie_word_embeddings=True)

    @classmethod
    def qwen3_vl_2b(cls) -> "Qwen3VLConfig":
        """Returns Qwen/Qwen3-VL-2B-Instruct."""
        text = Qwen3VLTextConfig(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16)
        return cls(text=text, vision=_small_vision(2048), tie_word_embeddings=True)


def _small_vision(out_hidden_size: int) -> Qwen3VLVisionConfig:
    return Qwen3VLVisionConfig(
        depth=24,
        hidden_size=1024,
        intermediate_size=4096,
        out_hidden_size=out_hidden_size,
        deepstack_visual_indexes=(5, 11, 17),
    )
