"""The configuration of a FLUX.2 transformer, and those of the published models."""

from dataclasses import dataclass

from clvr_jax.errors import ClvrError


@dataclass(frozen=True)
class Flux2TransformerConfig:
    """Configuration of a FLUX.2 transformer, with the field names of the diffusers `config.json`."""

    patch_size: int = 1
    in_channels: int = 128
    out_channels: int | None = None
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000
    eps: float = 1e-6
    guidance_embeds: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes_dims_rope", tuple(self.axes_dims_rope))
        positive = (
            "patch_size in_channels num_layers num_single_layers attention_head_dim num_attention_heads "
            "joint_attention_dim timestep_guidance_channels mlp_ratio rope_theta eps"
        )
        for name in positive.split():
            if getattr(self, name) <= 0:
                raise ClvrError(f"Flux2TransformerConfig.{name} is {getattr(self, name)}; it must be positive")
        if self.out_channels is not None and self.out_channels <= 0:
            raise ClvrError(f"Flux2TransformerConfig.out_channels is {self.out_channels}; it must be positive or None")
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(d <= 0 or d % 2 for d in self.axes_dims_rope):
            raise ClvrError(
                f"Flux2TransformerConfig.axes_dims_rope {self.axes_dims_rope} must be even numbers that sum to "
                f"attention_head_dim {self.attention_head_dim}"
            )
        if self.timestep_guidance_channels % 2:
            raise ClvrError(
                f"Flux2TransformerConfig.timestep_guidance_channels is {self.timestep_guidance_channels}; "
                "it must be even (cosines and sines)"
            )

    @property
    def inner_dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_dim(self) -> int:
        """Width of one half of the gated MLP."""
        return int(self.inner_dim * self.mlp_ratio)

    @property
    def token_channels(self) -> int:
        """Channels of one output token."""
        return self.patch_size**2 * (self.in_channels if self.out_channels is None else self.out_channels)

    @classmethod
    def klein_4b(cls) -> "Flux2TransformerConfig":
        """Returns FLUX.2 [klein] 4B and its base model (Apache-2.0): 3.876 B parameters."""
        return cls(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        )

    @classmethod
    def klein_9b(cls) -> "Flux2TransformerConfig":
        """Returns FLUX.2 [klein] 9B, its base and KV models (non-commercial license): 9.079 B parameters."""
        return cls(
            num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288, guidance_embeds=False
        )

    @classmethod
    def dev(cls) -> "Flux2TransformerConfig":
        """Returns FLUX.2 [dev] (non-commercial license), which is guidance-distilled."""
        return cls()
