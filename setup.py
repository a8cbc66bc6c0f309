"""The packages of the wheel; all else is in pyproject.toml, whose `packages.find` cannot map directories."""

from setuptools import find_packages, setup

MAPPED = ("configs", "convert")
"""Directories at the top of the repository that install as packages of `clvr_jax`."""

setup(
    packages=[
        *find_packages(include=["clvr_jax", "clvr_jax.*"]),
        *(f"clvr_jax.{name}" for name in find_packages(include=[*MAPPED, *(f"{name}.*" for name in MAPPED)])),
    ]
)
