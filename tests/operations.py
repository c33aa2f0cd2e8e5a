"""What PyTorch dispatches in a training step: a count of operations, and its matrix products to be timed alone."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Counted(TorchDispatchMode):
    """Counts what is dispatched, but for what only looks at memory in another way, or only reserves it."""

    FREE = ("detach", "alias", "empty", "empty_like", "empty_strided", "new_empty", "_local_scalar_dense")

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        looks = func.is_view or func._schema.name.partition("::")[2] in self.FREE
        self.operations += not looks
        return func(*args, **(kwargs or {}))


class Products(TorchDispatchMode):
    """Records the matrix products that are dispatched, to `replay` them on other numbers."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")

    def __init__(self):
        super().__init__()
        self.calls: list[Callable[[], object]] = []
        self.pool: dict[tuple, Tensor] = {}

    def operand(self, value: object) -> object:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        key = (value.shape, value.stride(), value.dtype)
        if key not in self.pool:  # an expanded tensor has strides of 0, so that it cannot be filled itself
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
