"""Decoding steps as CUDA graphs: some two hundred small kernels with one launch.

The capture itself was never run: it needs a GPU. The captured function is tested on a CPU.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from gpt2.cache import CacheExtension, KVCache
from gpt2.errors import RequestError
from gpt2.model import GPT

LENGTH_MULTIPLE = 128  # a graph attends over a multiple of this many positions
MIN_USES_TO_CAPTURE = 8  # a shape is captured at its 8th use
DecodeStep = Callable[[], Tensor]


class GraphedGPT:
    """`model`, with every frequent decoding step (one token per row) captured once and then replayed.

    A graph belongs to a cache, a number of rows, and a length that it attends over. Prefill runs without graphs.
    capture: turns a step into one that can be replayed with the current content of its input tensors.
    """

    def __init__(self, model: GPT, capture: Callable[[DecodeStep], DecodeStep] | None = None) -> None:
        self.model, self.config, self.device, self.lm_head = model, model.config, model.device, model.lm_head
        self._capture = capture or capture_cuda_graph
        self._use_counts: Counter[tuple[int, ...]] = Counter()
        self._graphs: dict[tuple[int, ...], _CapturedStep] = {}

    def make_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """See `GPT.make_cache`. Drops the graphs of earlier caches."""
        self._graphs.clear()
        self._use_counts.clear()
        return self.model.make_cache(batch_size, max_length)

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """See `GPT.hidden_states`."""
        if cache is None or tokens.size(1) != 1:
            return self.model.hidden_states(tokens, cache)
        if cache.length >= self.config.block_size:
            raise RequestError(f"{cache.length + 1} tokens do not fit the model's context of {self.config.block_size}")
        end = min(-(-(cache.length + 1) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, cache.max_length)
        key = (cache.data.data_ptr(), len(tokens), end)
        self._use_counts[key] += 1
        if self._use_counts[key] < MIN_USES_TO_CAPTURE:
            return self.model.hidden_states(tokens, cache)
        if key not in self._graphs:
            self._graphs[key] = _CapturedStep(self.model, cache, end, self._capture)
        return self._graphs[key].replay(tokens, cache)


class _CapturedStep:
    """A decoding step of one shape, with its static input tensors."""

    def __init__(self, model: GPT, cache: KVCache, end: int, capture: Callable[[DecodeStep], DecodeStep]) -> None:
        device = model.device
        self._tokens = torch.zeros(len(cache), 1, dtype=torch.long, device=device)
        self._positions = torch.from_numpy(cache.lengths[:, None].copy()).to(device)  # (B, 1)
        data, all_positions = cache.data, torch.arange(end, device=device)

        def step() -> Tensor:
            mask = all_positions <= self._positions[:, None, :, None]  # (B, 1, 1, S)
            return model.transformer(self._tokens, CacheExtension(data, self._positions, mask, end))

        self._step = capture(step)

    def replay(self, tokens: Tensor, cache: KVCache) -> Tensor:
        self._tokens.copy_(tokens)
        self._positions.copy_(torch.from_numpy(cache.lengths[:, None].copy()))
        cache.lengths += 1
        return self._step().clone()  # the next replay overwrites its output


def capture_cuda_graph(step: DecodeStep) -> DecodeStep:
    """Capture a step as a CUDA graph, after the warm-up on a side stream that torch's documentation requires.

    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden = step()

    def replay() -> Tensor:
        graph.replay()
        return hidden

    return replay
