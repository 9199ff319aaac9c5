"""Peak figures of devices, from their makers' data sheets (docs/planning.md names them)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlhf_ray.errors import ConfigError

GIB = 1 << 30
TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Device:
    """A GPU, or the cores of a machine that have a role to themselves.

    Fields:
        memory: bytes. flops: dense bfloat16 operations a second. bandwidth: of its memory, bytes a second.
        link: to the others of its node, network: to those of other nodes; bytes a second in one direction.
        latency: seconds that a decoding step of an engine takes beside reading and computing.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float
    latency: float = 4e-3

    @property
    def is_gpu(self) -> bool:
        return self.name != CPU

    def with_memory(self, gib: float | None) -> Device:
        return self if gib is None else replace(self, memory=gib * GIB)


CPU = "CPU"

_SHEETS = {
    # name: GB, bf16 TFLOP/s, GB/s of memory, NVLink GB/s both ways (PCIe where there is none), network Gbit/s
    "A10": (24, 125, 600, 64, 100),
    "L40S": (48, 362, 864, 64, 200),
    "A100-40GB": (40, 312, 1555, 600, 200),
    "A100": (80, 312, 2039, 600, 200),
    "A800": (80, 312, 2039, 400, 200),
    "H20": (96, 148, 4000, 900, 400),
    "H800": (80, 989.4, 3350, 400, 400),
    "H100": (80, 989.4, 3350, 900, 400),
    "H200": (141, 989.4, 4800, 900, 400),
    "B200": (180, 2250, 8000, 1800, 400),
    "GB200": (186, 2500, 8000, 1800, 400),
}

GPUS = {
    name: Device(
        name,
        # A device shows a little less than it is sold as: an H100 of 80 GB has 79.6 GiB.
        memory=gigabytes * 0.995 * GIB if gigabytes <= 80 else gigabytes * GIGA,
        flops=tflops * TERA,
        bandwidth=bandwidth * GIGA,
        link=link / 2 * GIGA,
        network=network / 8 * GIGA,
    )
    for name, (gigabytes, tflops, bandwidth, link, network) in _SHEETS.items()
}


def gpu(name: str) -> Device:
    """
    Raises:
        ConfigError: it is not in the table.
    """
    found = {known.lower(): device for known, device in GPUS.items()}.get(name.lower())
    if found is None:
        raise ConfigError(f"--gpu {name}: no figures for it; there are {', '.join(GPUS)}")
    return found


def cpu(cores: int, memory: float) -> Device:
    """A machine without a GPU. By core, what a server of 2023 with AMX gives: 1 TFLOP/s of bfloat16 matrix
    products, some 8 GB/s of memory."""
    bandwidth = cores * 8 * GIGA
    return Device(CPU, memory, cores * 1 * TERA, bandwidth, bandwidth / 2, 1.25 * GIGA, latency=2e-2)
