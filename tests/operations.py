"""Dispatch modes for benchmarks: count the operations of a training step, and record its matrix products."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class OperationCounter(TorchDispatchMode):
    """Counts dispatched operations, except views and allocations, which launch no kernel."""

    FREE = ("detach", "alias", "empty", "empty_like", "empty_strided", "new_empty", "_local_scalar_dense")

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        free = func.is_view or func._schema.name.partition("::")[2] in self.FREE
        self.operations += not free
        return func(*args, **(kwargs or {}))


class MatrixProducts(TorchDispatchMode):
    """Records dispatched matrix products, convolutions and fused attention; `replay` repeats them on random data."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")

    def __init__(self):
        super().__init__()
        self.calls: list[Callable[[], object]] = []
        self.pool: dict[tuple, Tensor] = {}

    def operand(self, value: object) -> object:
        """Return a random tensor of the same shape, strides and dtype; other arguments are returned as they are."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        key = (value.shape, value.stride(), value.dtype)
        if key not in self.pool:  # expanded tensors have strides of 0 and cannot be filled: fill their storage
            last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            memory = torch.empty(1 + last if value.numel() else 0, dtype=value.dtype, device=value.device)
            self.pool[key] = memory.normal_().as_strided(value.shape, value.stride())
        return self.pool[key]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.partition("::")[2]
        result = func(*args, **kwargs)
        if name in self.NAMES or "scaled_dot_product" in name:
            self.calls.append(functools.partial(func, *map(self.operand, args), **kwargs))
        return result

    def replay(self) -> None:
        for call in self.calls:
            call()
