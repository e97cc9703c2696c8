"""What the last words of a model server mean."""

from __future__ import annotations

import pytest

from trioswap.symptoms import OVERLAP, is_out_of_memory

# As engines print it; of the line the part that tells.
COMPLAINTS = [
    "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 8.00 MiB on device 0: cudaMalloc failed: out of memory",
    "alloc_tensor_range: failed to allocate CUDA0 buffer of size 17179869184",
    "llama_model_load: error loading model: unable to allocate ROCm0 buffer",
    "graph_reserve: failed to allocate compute buffers",
    "ggml_vulkan: Device memory allocation of size 17368219904 failed.",
    "ggml_vulkan: vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
    "error: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    "ggml_aligned_malloc: insufficient memory (attempted to allocate 1024.00 MB)",
    "UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
    "hipMalloc failed: hipErrorOutOfMemory",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
    "ValueError: Free memory on device (31.44/47.38 GiB) on startup is less than desired GPU memory utilization (0.9)",
    "ValueError: No available memory for the cache blocks.",
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8589934592 bytes.",
    "Failed to allocate memory for requested buffer of size 1073741824",
    "terminate called after throwing an instance of 'std::bad_alloc'",
    "mmap failed: Cannot allocate memory",
    "MemoryError",
]


@pytest.mark.parametrize("line", COMPLAINTS)
def test_a_complaint_of_too_little_memory_is_understood(line):
    """Whatever stands around it."""
    assert is_out_of_memory(b"...\nloading\n" + line.encode() + b"\nbye\n")


@pytest.mark.parametrize("line", COMPLAINTS)
def test_a_complaint_may_come_in_two_pieces(line):
    """Cut anywhere: what is looked at again with the second piece is enough."""
    text = line.encode()
    for cut in range(len(text)):
        first, second = b"loading\n" + text[:cut], text[cut:] + b"\n"
        assert is_out_of_memory(first) or is_out_of_memory(first[-OVERLAP:] + second), text[:cut]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "error: unknown argument: --memory",
        "llama_kv_cache: size = 512.00 MiB, device memory = 24564 MiB",
        "failed to open GGUF file: No such file or directory",
        "couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 5800",
        "CUDA error: no kernel image is available for execution on the device",
        "load_tensors: CUDA0 model buffer size = 4685.30 MiB",
        "Segmentation fault",
    ],
)
def test_other_last_words_are_no_such_complaint(line):
    """More memory would not help."""
    assert not is_out_of_memory(line.encode())
