"""Topologies by name, and what joins their chips."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from clvr_jax.cost_model.hardware import CHIPS, links, measured_cpu, parse_topology, planning_devices
from clvr_jax.errors import ClvrError, UsageError


@pytest.mark.parametrize(
    ("name", "canonical", "chips"),
    [
        ("v6e:16x16", "v6e:16x16", 256),
        ("v6e-256", "v6e:16x16", 256),
        ("v5e-8", "v5e:2x4", 8),
        ("V5P:4x4x8", "v5p:4x4x8", 128),
        ("v5p-8", "v5p:2x2x1", 4),  # TensorCores, two to a chip
        ("v5p-128", "v5p:4x4x4", 64),
        ("h100:16", "h100:16", 16),
        ("cpu:8", "cpu:8", 8),
    ],
)
def test_names(name, canonical, chips):
    topology = parse_topology(name)
    assert (topology.name, topology.devices) == (canonical, chips)


@pytest.mark.parametrize(
    "name", ["v7:2x2", "v5e", "v5e:16", "v5p:4x4", "v5p-9", "v6e:0x4", "h100-8", "cpu", "", "v5e:"]
)
def test_unknown_name_lists_what_there_is(name):
    with pytest.raises(UsageError, match=r"it must be v5e:AxB.*v5p-\{8,.*TensorCores") as error:
        parse_topology(name)
    assert "\n" not in str(error.value)


def test_devices_to_plan_with():
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    devices = planning_devices(parse_topology("v5e:4x4"))
    assert len(devices) == 16
    assert {device.platform for device in devices} == {"tpu"}
    assert len(planning_devices(parse_topology("cpu:4"))) == 4
    with pytest.raises(ClvrError, match="not divisible"):
        planning_devices(parse_topology("v6e:3x5"))
    with pytest.raises(ClvrError, match="device_count=64"):
        planning_devices(parse_topology("h100:64"))


class _Place:
    """Stands for a device of a topology: all that counts is where it is."""

    def __init__(self, coords=None, slice_index=0):
        self.slice_index = slice_index
        if coords is not None:
            self.coords = coords


def mesh_of(shape, names, places):
    grid = np.empty(len(places), object)
    grid[:] = places
    return Mesh(grid.reshape(shape), names)


def test_links_of_a_torus():
    v5e = parse_topology("v5e:16x16")
    places = [_Place((x, y, 0)) for x in range(16) for y in range(16)]
    link = CHIPS["v5e"].link_bandwidth
    whole = links(v5e, mesh_of((256, 1), ("fsdp", "tensor"), places), ("fsdp",))
    assert (whole.bandwidth, whole.hops) == (4 * link, 8)  # both rings, both directions
    cut = mesh_of((16, 16), ("fsdp", "tensor"), places)
    assert links(v5e, cut, ("tensor",)).bandwidth == 2 * link
    assert links(v5e, cut, ("fsdp", "tensor")) == whole
    half = mesh_of((32, 8), ("fsdp", "tensor"), places)
    assert links(v5e, half, ("tensor",)).bandwidth == link  # half a ring is a line


def test_rings_close_at_sixteen_chips_in_a_plane_and_at_whole_cubes_in_space():
    assert parse_topology("v6e:8x16").closes(1)
    assert not parse_topology("v6e:8x16").closes(0)
    assert parse_topology("v5p:4x4x8").closes(0)
    assert not parse_topology("v5p:2x4x4").closes(1)


def test_links_beyond_a_node_and_between_slices_are_the_network():
    h100 = parse_topology("h100:16")
    mesh = mesh_of((2, 8), ("data", "fsdp"), [_Place() for _ in range(16)])
    assert links(h100, mesh, ("fsdp",)).bandwidth == CHIPS["h100"].link_bandwidth
    assert links(h100, mesh, ("data",)).bandwidth == CHIPS["h100"].network_bandwidth
    slices = [_Place((x, y, 0), slice_index) for slice_index in range(2) for x in range(2) for y in range(2)]
    mesh = mesh_of((2, 4), ("data", "fsdp"), slices)
    assert links(parse_topology("v5e:2x2"), mesh, ("data",)).bandwidth == CHIPS["v5e"].network_bandwidth
    with pytest.raises(ClvrError, match="one device along"):
        links(h100, mesh_of((1, 16), ("data", "fsdp"), [_Place() for _ in range(16)]), ("data",))


def test_this_machine_is_shared_by_its_virtual_devices():
    one, four = measured_cpu(1), measured_cpu(4)
    assert one.hbm_bytes == 4 * four.hbm_bytes
    assert 1e9 < one.peak_flops < 1e15
    assert 1e8 < four.hbm_bandwidth < 1e13
    assert measured_cpu(4) is four  # measured once
    mesh = Mesh(np.array(jax.devices("cpu")[:4]), ("data",))
    assert links(parse_topology("cpu:4"), mesh, ("data",)).bandwidth == four.link_bandwidth
