"""Tasks: models, data and an objective, as a recipe trains them and as `clvr plan` compiles them.

A builder takes a bundle of models. Their weights are arrays, or shapes for the planner; the functions that it returns
are the same, so that the planned program is the one that trains. `flux2`, `qwen3_vl` and `sdxl` are the published
models, `shapes` the small ones of the shapes world.
"""
