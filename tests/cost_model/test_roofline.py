"""Times, bounds and dollars that can be worked out by hand, and the report of a real program."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from clvr_jax.cost_model import (
    elements_per_chip,
    fits,
    interconnect_seconds,
    measure,
    parse_topology,
    roofline,
    run_cost,
)
from clvr_jax.cost_model.hlo import Collective
from clvr_jax.cost_model.roofline import training_hbm_bytes
from clvr_jax.errors import ClvrError

V5E = parse_topology("v5e:2x4")


def test_what_bounds_a_step():
    times = roofline(
        V5E.chip, flops=197e12, hbm_bytes=819e9 / 2, interconnect={"fsdp": 1.5, "tensor": 0.5}, model_flops=98.5e12
    )
    assert (times.compute, times.hbm, times.interconnect) == (1, 0.5, 2)
    assert (times.overlapped, times.serial, times.bound) == (2, 3.5, "interconnect")
    assert times.mfu == pytest.approx(0.25)
    assert times.utilization(4.0) == pytest.approx(0.125)
    alone = roofline(V5E.chip, flops=197e12, hbm_bytes=1, interconnect={})
    assert (alone.bound, alone.mfu) == ("compute", 1)


def test_collectives_on_a_line_of_four():
    mesh = Mesh(np.array(jax.devices("cpu")[:8]).reshape(2, 4), ("data", "fsdp"))

    def seconds(kind, devices=4, axes=("fsdp",)):
        one = Collective(kind, "name", "", "bf16", 10**9, devices, axes, times=3)
        return interconnect_seconds([one], V5E, mesh)[one.axis]

    link = V5E.chip.link_bandwidth
    assert seconds("all-gather") == pytest.approx(3 * 0.75e9 / link)
    assert seconds("all-reduce") == pytest.approx(2 * seconds("reduce-scatter"))
    # The middle link of a line carries half of what two chips of four send, a quarter of it all each way.
    assert seconds("all-to-all") == pytest.approx(3 * 1e9 / link)
    assert seconds("collective-permute") == pytest.approx(3 * 1e9 / link)
    assert seconds("all-gather", 8, ("data", "fsdp")) == pytest.approx(3 * 0.875e9 / (2 * link))


def test_memory_traffic_of_a_training_step():
    n = 1000
    assert training_hbm_bytes(parameters=n, remat="dots") == 2 * 2 * 2 * n + 2 * n * (4 + 4 + 8)
    more = training_hbm_bytes(parameters=n, gathered=8 * n, activations=10, remat="full")
    assert more == 2 * 3 * 2 * 8 * n + 2 * n * (4 + 4 + 8) + 40


def test_fits_counts_donated_results_once():
    memory = SimpleNamespace(
        argument_size_in_bytes=10 * 2**30, output_size_in_bytes=10 * 2**30, alias_size_in_bytes=10 * 2**30,
        temp_size_in_bytes=5 * 2**30, generated_code_size_in_bytes=0,
    )  # fmt: skip
    assert fits(memory, V5E.chip)
    memory.alias_size_in_bytes = 0
    assert not fits(memory, V5E.chip)


def test_cost_of_a_run():
    assert run_cost(1.8, 1000, 8) == run_cost(3.6, 500, 8)
    assert run_cost(1.8, 1000, 8).chip_hours == pytest.approx(4)
    assert run_cost(1.8, 1000, 8, dollars_per_chip_hour=1.2).dollars == pytest.approx(4.8)


@pytest.fixture(scope="module")
def report():
    mesh = Mesh(np.array(jax.devices("cpu")[:8]).reshape(2, 4), ("data", "fsdp"))

    def laid_out(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    weights = jax.ShapeDtypeStruct((512, 512), jnp.float32, sharding=laid_out("fsdp"))
    x = jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=laid_out(("data", "fsdp")))
    step = jax.jit(
        lambda w, x: w - jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(w),
        out_shardings=laid_out("fsdp"),
        donate_argnums=0,
    )
    compiled = step.lower(weights, x).compile()
    return measure(
        compiled, compiled.as_text(), name="one layer", topology=parse_topology("cpu:8"), mesh=mesh,
        flops=3 * 2 * 64 * 512 * 512, parameters=elements_per_chip(weights), steps=1000, dollars_per_chip_hour=1.0,
    )  # fmt: skip


def test_report_of_a_compiled_step(report):
    assert report.parameters == 512 * 512 // 4
    assert report.memory.arguments == (512 * 512 // 4 + 8 * 512) * 4
    assert report.memory.output <= 64  # the donated weights hold the result
    assert report.memory.fits
    assert report.flops_per_chip == report.flops / 8
    assert sum(report.sent.values()) == pytest.approx(sum(one.sent for one in report.collectives))
    assert {one.kind for one in report.collectives} <= {"all-gather", "all-reduce", "reduce-scatter", "all-to-all"}
    assert report.sent["data"] > 0  # gradients of the two copies
    assert report.cost.dollars == report.cost.chip_hours > 0


def test_report_as_json_and_as_table(report):
    record = json.loads(json.dumps(report.to_json()))
    assert record["roofline"]["bound"] == report.roofline.bound
    assert record["memory"]["fits"] is True
    assert record["collectives"][0]["sent"] == report.collectives[0].sent
    console = Console(width=100)
    with console.capture() as captured:
        console.print(report.table())
    assert "one layer on cpu:8" in captured.get()
    assert "data 2 x fsdp 4 (8 chips)" in captured.get()


def test_mesh_of_another_size():
    mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("data",))
    with pytest.raises(ClvrError, match=r"has 2 devices, v5e:2x4 has 8"):
        measure(None, "", name="", topology=V5E, mesh=mesh, flops=1.0)
