"""Peak rates of common devices, from their makers' data sheets (dense, in the precision that ``auto`` means)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from trsr_dist.errors import ConfigError

GB = 10**9
GPU_PROCESS_BYTES = 2 * 1024**3
"""CUDA context, NCCL buffers and the allocator's slack, as commonly seen; not measured by this project."""
CPU_PROCESS_BYTES = 600_000_000
"""Python and the libraries, as measured: a training of the quickstart's model holds 0.66 GB, of which the planner
counts 0.04."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """One kind of device and the links between devices."""

    name: str
    flops_per_second: float
    """Dense matrix products in ``precision``."""
    memory_bytes: int
    memory_bytes_per_second: float
    node_bytes_per_second: float
    """One device to the others of its node, one direction."""
    network_bytes_per_second: float = 25 * GB
    """One device's share of the network between nodes, one direction; the usual 200 Gb/s a device."""
    precision: str = "bfloat16"
    """What ``auto`` means on it."""
    utilization: float = 0.4
    """Share of the rate that training usually reaches."""
    process_bytes: int = GPU_PROCESS_BYTES
    """Memory that a process takes beside weights, training state and activations."""
    is_cpu: bool = False
    float32_flops_per_second: float = 0.0
    """Likewise in float32, which PyTorch multiplies without TF32; 0: as above, for want of another."""

    def computing_in(self, precision: str) -> Hardware:
        """The device with its rate in a precision."""
        rate = self.float32_flops_per_second if precision == "float32" else 0.0
        return replace(self, flops_per_second=rate) if rate else self


CATALOGUE = {
    device.name: device
    for device in (
        # It has no bfloat16, in which case a training takes float32.
        Hardware("v100-32gb", 15.7e12, 32 * GB, 900 * GB, 150 * GB, 12.5 * GB, precision="float32"),
        Hardware("a100-40gb", 312e12, 40 * GB, 1555 * GB, 300 * GB, float32_flops_per_second=19.5e12),
        Hardware("a100-80gb", 312e12, 80 * GB, 2039 * GB, 300 * GB, float32_flops_per_second=19.5e12),
        Hardware("l40s", 362e12, 48 * GB, 864 * GB, 32 * GB, float32_flops_per_second=91.6e12),
        Hardware("h100", 989e12, 80 * GB, 3350 * GB, 450 * GB, 50 * GB, float32_flops_per_second=67e12),
        Hardware("h200", 989e12, 141 * GB, 4800 * GB, 450 * GB, 50 * GB, float32_flops_per_second=67e12),
    )
}


DESCRIBED = {
    "flops": "flops_per_second",
    "memory": "memory_bytes",
    "bandwidth": "memory_bytes_per_second",
    "node": "node_bytes_per_second",
    "network": "network_bytes_per_second",
}
"""Words of a description."""
OTHERS = ({"mig"}, {"nvl"}, {"h100", "pcie"})
"""Words of devices with other rates, or another memory, than the one of the catalogue that they are named after."""


def hardware(name: str) -> Hardware:
    """A device of the catalogue, or one that is described: ``flops=400e12,memory=96e9,bandwidth=4e12,node=300e9,
    network=50e9``, in FLOP/s, bytes and bytes per second.

    Raises:
        ConfigError: the name is unknown; lists the known ones. A description is incomplete or no number.
    """
    if "=" in name:
        return _described(name)
    if name not in CATALOGUE:
        raise ConfigError(
            f"hardware {name!r}: expected one of {', '.join(CATALOGUE)}, or a description with "
            f"{', '.join(f'{word}=' for word in DESCRIBED)}"
        )
    return CATALOGUE[name]


def _described(text: str) -> Hardware:
    pairs = dict(part.partition("=")[::2] for part in text.split(","))
    if pairs.keys() != DESCRIBED.keys():
        raise ConfigError(f"hardware {text!r}: found {', '.join(pairs)}, expected {', '.join(DESCRIBED)}")
    try:
        values = {DESCRIBED[word]: float(value) for word, value in pairs.items()}
    except ValueError as error:
        raise ConfigError(f"hardware {text!r}: {error}; expected numbers such as 312e12") from None
    if not all(0 < value < math.inf for value in values.values()):
        raise ConfigError(f"hardware {text!r}: expected finite numbers above 0")
    return Hardware("described", **values)


def recognize(device_name: str) -> Hardware | None:
    """The device of the catalogue whose name stands in what the driver says, such as ``NVIDIA H100 80GB HBM3``; not a
    part of one (MIG), nor its slower relatives."""
    words = set(device_name.lower().replace("-", " ").split())
    if any(other <= words for other in OTHERS):
        return None
    for device in CATALOGUE.values():
        name, _, size = device.name.partition("-")
        if name in words and (not size or size in words):
            return device
    return None
