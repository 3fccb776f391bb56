"""A plan and how it is printed, whichever kind of run it is of."""

import math
from dataclasses import dataclass, field, fields

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
class Part:
    """What one part of a training takes.

    Attributes:
        flops16: FLOPs per sample in 16 bits, forward and backward.
        flops32: FLOPs per sample in 32 bits or more.
        memory: bytes on one device.
        disk: bytes at most.
    """

    flops16: float = 0
    flops32: float = 0
    memory: float = 0
    disk: float = 0


@dataclass(frozen=True)
class Work:
    """What a training takes.

    Attributes:
        samples: what is computed, such as `118,287 images x 2 passes`.
        count: number of those samples.
        parts: by name.
        sharded: bytes of memory that FSDP divides between devices.
        images: to read per sample.
    """

    samples: str
    count: int
    parts: dict[str, Part]
    sharded: float = 0
    images: float = 1

    @property
    def total(self) -> Part:
        """Sums of all parts."""
        return Part(*(sum(getattr(part, each.name) for part in self.parts.values()) for each in fields(Part)))


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
        """Formats the plan for people, with a table of its parts; 1 GB is 10^9 bytes."""
        import pandas as pd

        lines = [f"{subject}: {text}" for subject, text in self.facts.items()]
        if self.work is None:
            return lines
        work, count, total = self.work, devices.count, self.work.total
        parts = {name: part for name, part in work.parts.items() if part != Part()} | {"total": total}
        rows = [_row(part, work.count, devices) for part in parts.values()]
        columns = ["per sample", "all samples", "time", "memory", "disk"]
        table = pd.DataFrame(rows, index=list(parts), columns=columns).to_string()
        rates = f"{devices.tflops16:g} TFLOP/s in 16 bits and {devices.tflops32:g} in 32 bits"
        share = total.flops32 / (total.flops16 + total.flops32)
        lines += ["", *map(str.rstrip, table.splitlines()), ""]
        lines.append(f"samples: {work.samples}, {share:.0%} of the FLOPs in 32 bits")
        lines.append(
            f"time: on {count} {'devices' if count > 1 else 'device'}, at {rates} (assumed; see probing plan --help)"
        )
        seconds = _seconds(total, work.count, devices)
        if work.images and seconds > 60:
            needed = work.count * work.images / seconds
            cores = f"{math.ceil(needed / IMAGES_PER_CORE):,} CPU cores, at {IMAGES_PER_CORE} a core (assumed)"
            lines.append(f"reading: {math.ceil(needed):,} images a second need {cores}")
        if work.sharded and count > 1:
            sharded = f"{si(work.sharded, 'B')} to {si(work.sharded / count, 'B')}"
            lines.append(f"memory: per device; FSDP shards {sharded}")
        return lines


def _seconds(part: Part, count: int, devices: Devices) -> float:
    return count * (part.flops16 / devices.tflops16 + part.flops32 / devices.tflops32) / 1e12 / devices.count


def _row(part: Part, count: int, devices: Devices) -> list[str]:
    """Formats a row of the table; what a part does not take is empty."""
    flops, seconds = part.flops16 + part.flops32, _seconds(part, count, devices)
    time = f"{seconds / 3600:.3g} h" if seconds >= 3600 else f"{seconds / 60:.3g} min" if seconds >= 60 else "< 1 min"
    bytes_ = [si(size, "B") if size else "" for size in (part.memory, part.disk)]
    return [*((si(flops, "FLOP"), si(count * flops, "FLOP"), time) if flops else ("", "", "")), *bytes_]
