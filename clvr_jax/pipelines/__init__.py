"""Models, tokenizer and sampler made usable."""
