"""The one import of FAISS, with errors for a missing or doubled installation, and its transfer to and from a GPU."""

import logging
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

from curate.core.errors import UserError

log = logging.getLogger(__name__)

# Packages that install the module `faiss`.
_OWNERS = ("faiss-cpu", "faiss-gpu")


def load_faiss() -> Any:
    """Import FAISS.

    Raises:
        UserError: it is not installed, or two packages that install the module are.
    """
    # The later one overwrites files of the other: a mix of both may import and crash.
    installed = [name for name in _OWNERS if _is_installed(name)]
    if len(installed) > 1:
        raise UserError(
            f"both {' and '.join(installed)} are installed and own the same module; uninstall both and install one: "
            'pip install "curate[cpu]" or pip install "curate[gpu]"'
        )
    try:
        import faiss
    except ImportError:
        raise UserError('faiss is not installed; pip install "curate[cpu]" (or "curate[gpu]" with CUDA)') from None
    return faiss


def on_gpu(faiss: Any, index: Any) -> Any:
    """Move an index to the first GPU; return it as it is where no GPU exists or FAISS cannot move its kind."""
    # faiss-cpu has no GPU classes at all.
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        return index
    try:
        moved = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    except RuntimeError as error:
        log.warning("this index stays on the CPU: %s", str(error).splitlines()[0])
        return index
    log.info("the index is on the GPU")
    return moved


def on_cpu(faiss: Any, index: Any) -> Any:
    """Move an index to main memory, from where it can be written to disk."""
    return faiss.index_gpu_to_cpu(index) if hasattr(index, "getDevice") else index  # GPU indexes alone have it


def _is_installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True
