"""The optimizer, one optimizer step as a pure function, initial weights, and training of a LoRA."""
