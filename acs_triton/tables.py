"""Tables on a device: made once, and kept as long as something reads them."""

from __future__ import annotations

from functools import lru_cache, wraps

import torch


def keep(maxsize: int):
    """``lru_cache(maxsize)`` for functions that make tables on the device that is their last argument.

    What a CUDA graph is captured with is kept for good: the graph reads its memory whenever it is replayed.
    """

    def decorate(make):
        cached, captured = lru_cache(maxsize=maxsize)(make), {}

        @wraps(make)
        def get(*arguments):
            tables = cached(*arguments)
            if arguments[-1].type == "cuda" and torch.cuda.is_current_stream_capturing():
                captured[arguments] = tables
            return tables

        get.cache_info, get.cache_clear = cached.cache_info, cached.cache_clear
        return get

    return decorate
