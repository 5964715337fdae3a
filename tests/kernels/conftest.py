"""Kernel tests are written once and run wherever Triton drives a device.

* interpreted: ``TRITON_INTERPRET=1 pytest tests/kernels``
* emulated: ``EMULATED_SM=80 pytest -p emulated_gpu tests/kernels`` with the emulator on ``PYTHONPATH``
* on hardware: ``pytest tests/kernels``

``TRITON_INTERPRET`` is read when the kernels are decorated, so ``tests/test_kernels.py`` starts the
first two in processes of their own.
"""

import pytest
import torch

from acs_triton.kernels import device as triton_device

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def pytest_collection_modifyitems(config, items):
    """Kernel tests under an emulated GPU carry its marker; without any device they are skipped."""
    reason = triton_device.why_not()
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
            elif not triton_device.INTERPRETED and not triton_device.current().hardware:
                item.add_marker(pytest.mark.emulated)


@pytest.fixture
def device():
    """What Triton drives. Memory that a kernel's host code allocates is filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield triton_device.current()
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def copy_engine(device):
    """Skips where nothing fetches boxes by descriptors."""
    from acs_triton.kernels import descriptors  # needs Triton, which a device has

    if device.interpreted and tuple(map(int, triton_device.triton.__version__.split(".")[:2])) < (3, 6):
        pytest.skip("Triton 3.5 interprets no descriptors with strides of fewer than 16 elements")
    if not device.interpreted and (device.backend != "cuda" or device.arch < descriptors.MINIMUM_CAPABILITY):
        pytest.skip("needs compute capability 9.0")
    return device


@pytest.fixture(params=list(DTYPES))
def dtype(request, device):
    if request.param == "float64" and not device.interpreted:
        pytest.skip("float64 kernels run in the interpreter only")
    return DTYPES[request.param]


@pytest.fixture
def main_dtype(device):
    """The dtype in which every case is run: what the compiled kernels are for, or what interprets exactly."""
    return torch.float32 if device.interpreted else torch.float16


@pytest.fixture
def fp32_precision(device):
    """``fp32_precision("ieee")`` sets how float32 convolutions round their operands."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    yield lambda value: setattr(conv, "fp32_precision", value)
    conv.fp32_precision = before


@pytest.fixture
def make(device):
    """``make(shape, dtype, seed, format, offset)``: normal random values, surrounded in memory by NaN.

    ``offset`` elements shift the data from the allocation's 16-byte alignment.
    """

    def make(shape, dtype, seed=0, format=torch.contiguous_format, offset=0):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        if len(shape) == 5:
            values = values.contiguous(memory_format=format)
        margin = 4096
        buffer = torch.full((values.numel() + 2 * margin,), float("nan"), dtype=dtype, device=device.torch_device)
        result = buffer.as_strided(values.shape, values.stride(), margin + offset)
        return result.copy_(values)

    return make
