"""LoRA files in the formats of diffusers, PEFT, kohya, ai-toolkit and LyCORIS <-> LoRA trees."""

from clvr_jax.convert.lora.trees import load_lora, save_lora

__all__ = ["load_lora", "save_lora"]
