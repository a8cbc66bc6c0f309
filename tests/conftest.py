"""Eight virtual devices for every test, so that meshes are real; what names no device runs on the first."""

import os

from clvr_jax.training.distributed import virtual_devices

# A program for a TPU may be compiled, but none is here to be looked for.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Most of the time goes into compiling small programs, which run once or twice.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ.update(virtual_devices(8))
