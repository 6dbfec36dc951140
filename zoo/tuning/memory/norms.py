"""Batch normalisation that keeps nothing of its input in eval mode, where it is frozen."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from zoo.tuning.memory._kept import (
    frozen,
    watched,
)


class SavingBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Base of those of one to three dimensions."""

    def reads_its_input(self) -> bool:
        """Whether the backward pass, as things are now, takes the input."""
        return (
            self.training
            or self._buffers["running_mean"] is None
            or not frozen(self._parameters["weight"])
        )

    def forward(self, input: Tensor) -> Tensor:
        if self.reads_its_input() or not watched(input, self.bias):
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        return self._folded(input)

    def _folded(self, x: Tensor) -> Tensor:
        """Scale and shift: operations of which autograd keeps C numbers.

        On small images it is the number of operations that counts.
        """
        # Past `nn.Module.__getattr__`, which takes as long as one of them.
        mean, variance = self._buffers["running_mean"], self._buffers["running_var"]
        weight: Tensor | None = self._parameters["weight"]
        bias: Tensor | None = self._parameters["bias"]
        assert mean is not None
        assert variance is not None
        narrow = x.dtype
        wide = torch.promote_types(narrow, torch.float32)
        if not narrow == mean.dtype == wide:
            x, mean, variance = x.to(wide), mean.to(wide), variance.to(wide)
            weight = None if weight is None else weight.to(wide)
            bias = None if bias is None else bias.to(wide)
        scale = torch.rsqrt(variance + self.eps)
        if weight is not None:
            scale = scale * weight
        shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
        shape = (-1, *[1] * (x.ndim - 2))
        shift, scale = shift.view(shape), scale.view(shape)
        if x.is_contiguous() and not torch._C._are_functorch_transforms_active():
            # Of two numbers per plane, kernels vectorise with one at a time.
            y = (x * scale).add_(shift)
        else:
            y = torch.addcmul(shift, x, scale)
        return y if narrow == wide else y.to(narrow)


class SavingBatchNorm1d(SavingBatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` that keeps what the backward pass needs."""


class SavingBatchNorm2d(SavingBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` that keeps what the backward pass needs."""


class SavingBatchNorm3d(SavingBatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d` that keeps what the backward pass needs."""


NORMS: Mapping[type[nn.Module], type[nn.Module]] = MappingProxyType(
    {
        nn.BatchNorm1d: SavingBatchNorm1d,
        nn.BatchNorm2d: SavingBatchNorm2d,
        nn.BatchNorm3d: SavingBatchNorm3d,
    }
)
"""As in `CONVOLUTIONS`."""
