"""A deployed model as CUDA graphs: one launch a pass, static buffers, no allocation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from erq.inputs import image_shape, placement, preprocessing

_WARM_UP_RUNS = 3
"""Passes before the capture: kernels are compiled, handles and workspaces made."""


@dataclass(frozen=True)
class Graph:
    """One captured pass.

    Args:
        images: [B, C, H, W], what `replay` reads. result: what it writes.
    """

    images: Tensor
    result: Tensor
    replay: Callable[[], None]


class CudaGraphs(nn.Module):
    """A model whose passes at some batch sizes are captured CUDA graphs.

    A batch between two captured sizes runs in the graph of the larger one, filled up with what it
    held before; one beyond the largest runs in the model itself, launch by launch. The weights are
    those of the capture's time, by address: make new graphs after loading others or moving the
    model.
    """

    def __init__(
        self,
        net: nn.Module,
        batch_sizes: Sequence[int] = (1, 8),
        input_shape: tuple[int, int, int] | None = None,
    ) -> None:
        """Capture a pass for each batch size.

        Args:
            net: images [B, C, H, W] → [B, …], on a CUDA device; kept as it is, in eval mode.
            batch_sizes: images of one pass.
            input_shape: (channels, height, width); by default what the model says of itself.

        Raises:
            ValueError: a model that is not on a CUDA device, a batch size below 1, or a model that
                does not say what it takes or does not return one tensor with a row per image.
        """
        super().__init__()
        sizes = sorted(set(batch_sizes))
        for size in sizes:
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"batch sizes must be integers >= 1, got {size!r}")
        if not sizes:
            raise ValueError("batch_sizes is empty: name at least one, such as (1, 8)")
        device, dtype = placement(net)
        if device.type != "cuda":
            raise ValueError(
                f"CUDA graphs need a model on a CUDA device, got one on {device}: move it with "
                '.to("cuda"), or call it as it is'
            )
        if input_shape is None and image_shape(net) is None:
            raise ValueError(
                f"a {type(net).__name__} does not say which images it takes: give input_shape, "
                "such as (3, 224, 224)"
            )
        shape = preprocessing(net).shape if input_shape is None else tuple(input_shape)
        self.net = net.eval()
        self._graphs = {
            size: capture(net, torch.zeros(size, *shape, device=device, dtype=dtype))
            # Large first: the smaller ones find room in what it reserved.
            for size in reversed(sizes)
        }

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Those that were captured, ascending."""
        return tuple(sorted(self._graphs))

    def forward(self, x: Tensor) -> Tensor:
        """The model's output for images [B, C, H, W]; the next call overwrites it.

        Raises:
            ValueError: images of another shape, dtype or device than those of the capture.
        """
        size = min((s for s in self._graphs if s >= len(x)), default=None)
        if size is None:
            return self.net(x)  # type: ignore[no-any-return]
        graph = self._graphs[size]
        wanted = graph.images[: len(x)]
        if (x.shape, x.dtype, x.device) != (wanted.shape, wanted.dtype, wanted.device):
            raise ValueError(
                f"the graphs take [≤ {size}, {', '.join(map(str, wanted.shape[1:]))}] "
                f"{wanted.dtype} on {wanted.device}, got {list(x.shape)} {x.dtype} on {x.device}"
            )
        wanted.copy_(x)
        graph.replay()
        return graph.result[: len(x)]


def capture(net: nn.Module, images: Tensor) -> Graph:
    """A pass of `net` over a batch of its own, captured after it has been run.

    Raises:
        ValueError: a model that does not return one tensor with a row per image.
    """
    with torch.no_grad(), torch.cuda.device(images.device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_RUNS):
                result = net(images)
        torch.cuda.current_stream().wait_stream(side)
        if not isinstance(result, Tensor) or len(result) != len(images):
            raise ValueError(
                f"{type(net).__name__} must return one tensor with a row per image, got "
                f"{list(result.shape) if isinstance(result, Tensor) else type(result).__name__}"
            )
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = net(images)
    return Graph(images, result, graph.replay)
