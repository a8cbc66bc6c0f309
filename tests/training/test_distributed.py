"""What the environment of a process says about other processes."""

import pytest

from clvr_jax.training.distributed import _is_managed


@pytest.mark.parametrize(("count", "several"), [("2", True), ("1", False), ("", False), ("two", False), ("-1", False)])
def test_a_number_of_tasks_that_is_none_means_one(count, several, monkeypatch):
    for name in ("OMPI_COMM_WORLD_SIZE", "NNODES", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("clvr_jax.training.distributed._is_tpu_vm", lambda: False)
    monkeypatch.setenv("SLURM_NTASKS", count)
    assert _is_managed() is several
