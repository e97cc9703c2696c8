"""What the last words of a model server say about why it ended."""

from __future__ import annotations

import re
from typing import Final

# What engines print when memory is short: CUDA and HIP runtimes, ggml's backends (Vulkan, Metal, SYCL),
# PyTorch, vLLM (which looks at what is free before it begins), the C++ and C libraries, Python.
_OUT_OF_MEMORY: Final = re.compile(
    rb"out of (?:device |host |gpu )?memory|OutOf(?:Device|Host)?Memory|ERROR_OUT_OF|cudaMalloc failed|hipMalloc failed"
    rb"|failed to allocate (?:memory|buffer|compute|\S+ buffer)|unable to allocate \S+ buffer|Insufficient Memory"
    rb"|memory allocation of size \d+ failed"
    rb"|less than desired GPU memory utilization|No available memory for the cache blocks"
    rb"|std::bad_alloc|Cannot allocate memory|MemoryError",
    re.IGNORECASE,
)
# So much of the end of one piece is looked at again with the next: a message may lie across.
OVERLAP: Final = 64


def is_out_of_memory(output: bytes) -> bool:
    """Whether *output* complains of too little memory."""
    return _OUT_OF_MEMORY.search(output) is not None
