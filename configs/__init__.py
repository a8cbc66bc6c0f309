"""Recipes: one file per run."""
