"""The packages of the wheel; all else is in pyproject.toml, whose `packages.find` cannot map directories."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["clvr_jax", "clvr_jax.*"]), "clvr_jax.configs", "clvr_jax.convert"])
