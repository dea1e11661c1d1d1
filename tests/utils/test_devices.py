import platform
import resource

import pytest

from featinv.utils.devices import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_reused_without_page_faults():
    keep_freed_memory()
    faults = []
    for _ in range(4):
        bytes(range(256)) * 2**17  # 32 MiB, 8,192 pages
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert faults[-1] - faults[1] < 1000
