"""A whole call of PyTorch as one CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor


def capture(call: Callable[..., Tensor], *static: Tensor, warm_up: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of `call(*static)` and the tensor that every replay leaves its result in, after `warm_up` calls beside it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            call(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(*static)
    return graph, result
