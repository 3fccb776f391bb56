"""A plan and how it is printed, whichever kind of run it is of."""

import math
from dataclasses import dataclass, field

from probing.utils.units import si

IMAGES_PER_CORE = 20
"""Images a second that a CPU core decodes and prepares for LLaVA-1.5 and the paper's three teachers.

Measured by `python -m tests.benchmarks.reading`.
"""


@dataclass(frozen=True)
class Devices:
    """Where a run is computed; the rates are assumptions.

    Attributes:
        count: devices with one process each, which share the samples.
        tflops16: TFLOP/s that a device sustains in 16 bits.
        tflops32: TFLOP/s that a device sustains in 32 bits.
    """

    count: int = 1
    tflops16: float = 150.0
    tflops32: float = 40.0


@dataclass(frozen=True)
class Work:
    """FLOPs, memory and disk of a training.

    Attributes:
        samples: what is computed, such as `118,287 images x 2 passes`.
        count: number of those samples.
        flops16: FLOPs per sample in 16 bits, forward and backward.
        flops32: FLOPs per sample in 32 bits or more.
        memory: bytes on one device, by part.
        sharded: bytes of those that FSDP divides between devices.
        disk: bytes at most.
        images: to read per sample.
    """

    samples: str
    count: int
    flops16: float
    flops32: float
    memory: dict[str, float]
    sharded: float
    disk: int
    images: float = 1


@dataclass(frozen=True)
class Plan:
    """What a command would do, by subject, and what it would take.

    Attributes:
        facts: one printed line each, `subject: text`.
        work: of a training whose cost is known.
    """

    facts: dict[str, str] = field(default_factory=dict)
    work: Work | None = None

    def lines(self, devices: Devices) -> list[str]:
        """Formats the plan for people; 1 GB is 10^9 bytes."""
        lines = [f"{subject}: {text}" for subject, text in self.facts.items()]
        if self.work is None:
            return lines
        work, count = self.work, devices.count
        flops = work.flops16 + work.flops32
        seconds = work.count * (work.flops16 / devices.tflops16 + work.flops32 / devices.tflops32) / 1e12 / count
        time = f"{seconds / 3600:.3g} h" if seconds > 60 else "less than a minute"
        rates = f"{devices.tflops16:g} TFLOP/s in 16 bits and {devices.tflops32:g} in 32 bits"
        needed = work.count * work.images / seconds
        cores = f"{math.ceil(needed / IMAGES_PER_CORE):,} CPU cores, at {IMAGES_PER_CORE} a core (assumed)"
        parts = ", ".join(f"{name} {si(size, 'B')}" for name, size in work.memory.items() if size)
        memory = f"{si(sum(work.memory.values()), 'B')} per device ({parts})"
        if work.sharded and count > 1:
            memory += f"; FSDP shards {si(work.sharded, 'B')} of it to {si(work.sharded / count, 'B')}"
        return [
            *lines,
            f"work: {work.samples} x {si(flops, 'FLOP')} = {si(work.count * flops, 'FLOP')}, "
            f"{work.flops32 / flops:.0%} in 32 bits",
            f"time: {time} on {count} {'devices' if count > 1 else 'device'}, at {rates} (assumed; see --tflops)",
            *([f"reading: {math.ceil(needed):,} images a second need {cores}"] if needed and seconds > 60 else []),
            f"memory: {memory}",
            f"disk: {si(work.disk, 'B')} at most",
        ]
