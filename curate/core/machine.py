"""Free disk and memory: default limits follow them, so that no fixed number refuses a larger model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from curate.core.errors import UserError

if TYPE_CHECKING:
    import torch

_MEMORY = Path("/proc/meminfo")
# Folder, limit, use and cached files of the process's control group, version 2 and 1.
_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "cache"),
)


def usable_device(name: torch.device | str) -> torch.device:
    """Return a torch device, once a tensor was put on it.

    Raises:
        UserError: there is no such device here.
    """
    import torch

    # An empty tensor shows what `torch.device` alone accepts: a GPU that is not there.
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # what torch raises, by the kind of device
        raise UserError(f"device {str(name)!r} cannot be used ({str(error).splitlines()[0]}); set device") from None


def free_disk(folder: Path) -> int:
    """Measure the free bytes of the disk that a folder lies on, or will lie on."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def free_memory(device: torch.device) -> int:
    """Measure the free bytes of a GPU's memory, or of the machine's (of its container's, where that has less)."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    free = 1024 * _numbers(_MEMORY)["MemAvailable:"]
    for folder, limit, use, cached in _GROUPS:
        if (folder / limit).exists() and (most := (folder / limit).read_text(encoding="ascii").strip()) != "max":
            # Cached files count as use there, but the kernel gives them back when memory is short.
            used = int((folder / use).read_text(encoding="ascii")) - _numbers(folder / "memory.stat")[cached]
            free = min(free, int(most) - used)
    return max(free, 0)


def _numbers(path: Path) -> dict[str, int]:
    """Read a file with a name and a number per line."""
    lines = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return {name: int(number) for name, number, *_ in lines}
