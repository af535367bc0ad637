# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Checks that memory suffices before it is allocated."""

from pathlib import Path

import torch


def available_bytes(device: torch.device) -> float:
    """How many bytes can be allocated on a device; infinity where that cannot be found out."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return float("inf")
    limits = [float("inf")]
    meminfo, cgroup = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            limits.append(1024.0 * int(fields["MemAvailable"].split()[0]))
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit != "max":
            limits.append(float(limit) - float((cgroup / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(limits)


def require_memory(
    needed: float, what: str, device: torch.device, advice: str, limit: float | None = None
) -> None:
    """
    Raises :class:`MemoryError`, with the sizes and the advice, if bytes that are about to be allocated do not fit into
    the limit, by default what is available.

    Example::

        >>> require_memory(8e12, "structure='full'", torch.device("cpu"), "Use structure='kronecker'.", 1e9)
        Traceback (most recent call last):
            ...
        MemoryError: structure='full' needs about 8,000 GB but 1 GB are available on cpu. Use structure='kronecker'.
    """
    limit = available_bytes(device) if limit is None else limit
    if needed > limit:
        raise MemoryError(
            f"{what} needs about {readable(needed)} but {readable(limit)} are available on {device}. {advice}"
        )


def readable(size: float) -> str:
    """A number of bytes with a unit."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.3g} {unit}" if size < 1e12 else f"{size / factor:,.0f} {unit}"
    return f"{size:.0f} bytes"
