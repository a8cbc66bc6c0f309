"""The paper's tables in miniature, measured in the shapes world; `clvr_jax/scripts/paper.py` runs them.

Models (`models`) are compared in modes (`rows`). Results of a stage (`stages`) are stored under the hash of its inputs
and reused. Tables, plots and the page are functions of results.
"""
