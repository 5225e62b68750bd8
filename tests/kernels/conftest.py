"""Every module of kernel tests says in KERNELS which kernels it proves; here they are seen to have been launched.

Where there is no GPU, the kernels run under Triton's interpreter: tests/conftest.py asks for it.
"""

import pytest


@pytest.fixture(autouse=True, scope="module")
def launched(request):
    """Note the kernels that a module's tests launch; all of KERNELS must be among them where the module ran whole."""
    names = getattr(request.module, "KERNELS", None)
    if names is None:
        yield None
        return
    from triton.runtime.jit import KernelInterface

    seen, original = set(), KernelInterface.__getitem__

    def noting(kernel, grid):
        seen.add(kernel.__name__)
        return original(kernel, grid)

    KernelInterface.__getitem__ = noting
    yield seen
    KernelInterface.__getitem__ = original
    options = request.config.option
    part = (
        options.keyword or options.markexpr not in ("", "not real") or any("::" in word for word in options.file_or_dir)
    )
    part = part or request.session.testsfailed
    assert part or set(names) <= seen, f"{request.module.__name__} never launched {sorted(set(names) - seen)}"
