"""Eight virtual devices for every test, so that meshes are real; what names no device runs on the first."""

import os

# A program for a TPU may be compiled, but none is here to be looked for.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

# The devices of a busy machine may be slow to meet; XLA would end the process after 40 seconds.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
if _FLAGS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
