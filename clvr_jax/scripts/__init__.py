"""Programs that are run by `python -m clvr_jax.scripts.NAME`: what the recipes of the shapes world need or leave."""
