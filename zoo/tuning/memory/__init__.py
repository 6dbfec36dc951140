"""Training with only the memory that the backward pass needs.

For a layer that is linear in its parameters, the gradient of the input takes the weight, and that
of the weight takes the input. PyTorch keeps both, whichever of them is asked for, in convolutions
and in batch normalisation; it keeps the input of pooling, of which only the shape is read, and a
whole float per element of a ReLU, of which one bit is read. `save_memory` makes these layers keep
what is used, which changes neither outputs nor gradients. Linear layers need no such help.

It is done by hooks on what the operators of torch keep, which run these as they are. Transforms of
functions, compilers and autocasting do not go with hooks: there, functions of our own do it.

Sources: Bhatia, Dangel, "Lowering PyTorch's Memory Consumption for Selective Differentiation"
(arXiv:2404.12406); Chen et al., "Training Deep Nets with Sublinear Memory Cost"
(arXiv:1604.06174) for checkpoints. Leaky and bounded ReLUs, average pooling, double backward and
the transforms of `torch.func` are added here.

Shape notation: B examples, C channels, S spatial dimensions (one to three of them).
"""

from zoo.tuning.memory.convolutions import convolution
from zoo.tuning.memory.models import (
    Report,
    checkpoint_blocks,
    graph_bytes,
    restore_memory,
    save_memory,
)

__all__ = [
    "Report",
    "checkpoint_blocks",
    "convolution",
    "graph_bytes",
    "restore_memory",
    "save_memory",
]
