"""Pipelines: models with their tokenizer and sampler, placed on a mesh."""
