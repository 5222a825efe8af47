"""GraphedForOne: a function that a CUDA graph replays for a single image, with one launch for all of its kernels."""
from typing import Any, Callable, Dict, Tuple

import torch

__all__ = ['GraphedForOne']

MAX_GRAPHS = 4  # input shapes of one function that are recorded; a graph holds memory


class GraphedForOne:
    """A function of one or more tensors and then other arguments, recorded as a CUDA graph for a single image.

    The host decides which functions run, so a block that is closed launches nothing. Calls for more images, of ever new
    shapes or under autocast run the function. A graph has memory of its own: no two threads may call it at a time.
    """

    def __init__(self, function: Callable[..., torch.Tensor], pool: Any) -> None:
        """
        Args:
            function: Returns a tensor. It does not wait for the device.
            pool: Memory that the graphs of a model share, of torch.cuda.graph_pool_handle.
        """
        self.function = function
        self.pool = pool
        self.graphs: Dict[Tuple[Any, ...], Any] = {}

    def __call__(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        tensors = [x, *(arg for arg in args if isinstance(arg, torch.Tensor))]
        if len(x) != 1 or torch.is_autocast_enabled(x.device.type):
            return self.function(x, *args)
        others = args[len(tensors) - 1:]
        key = (*((t.shape, t.stride(), t.dtype) for t in tensors), *others)
        if key not in self.graphs:
            if len(self.graphs) == MAX_GRAPHS:
                return self.function(x, *args)
            with torch.inference_mode(False), torch.no_grad():
                self.graphs[key] = torch.cuda.make_graphed_callables(
                    lambda *own: self.function(*own, *others), tuple(t.clone() for t in tensors), pool=self.pool)
        return self.graphs[key](*tensors).clone()  # the next replay writes into the same memory
