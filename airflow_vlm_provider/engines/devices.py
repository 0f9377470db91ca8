"""The device that a model runs on: which one, in what precision, and what its errors mean."""

from __future__ import annotations

import gc
from typing import Any

from airflow_vlm_provider.errors import ConfigError

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")
_LOST = ("cuda error", "cudnn error", "cublas_status", "hip error", "nccl error", "device-side assert")


def pick_device(device: str | None) -> Any:
    """The device of this name, or else the best there is.

    :raises ConfigError: there is no such device.
    """
    import torch

    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device={device!r} can't be used on this worker ({reason}); leave it out to take the best there is"
        ) from error
    return picked


def pick_dtype(dtype: Any, device: Any) -> Any:
    """The precision of this name, or else what suits the device.

    :param dtype: ``"auto"`` (the checkpoint's own), a name such as ``"bfloat16"``, a ``torch.dtype``, or None.
    :raises ConfigError: there is no such precision.
    """
    import torch

    if dtype is None:
        if device.type == "cuda":
            return (
                torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
            )
        return torch.bfloat16 if device.type == "mps" else torch.float32
    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    picked = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(picked, torch.dtype):
        raise ConfigError(f"dtype={dtype!r} is unknown; use 'auto', 'bfloat16', 'float16' or 'float32'")
    return picked


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch could have gone through."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def is_device_lost(error: BaseException) -> bool:
    """Whether the device answers nothing more in this process."""
    import torch

    # Before torch 2.8 there is no class for it.
    if isinstance(error, getattr(torch, "AcceleratorError", ())):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _LOST)


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
