"""The feature cache spills to the host's memory, and its default follows free memory."""

import platform
import subprocess
import sys

import pytest
import torch

from open_mmicl import memory
from open_mmicl.interface.base import Work
from open_mmicl.interface.features import EncodedImage, FeatureCache
from open_mmicl.memory import Budget, image_budget

SIZE = 100  # float32 numbers of a value


def tensor(source: int) -> torch.Tensor:
    return torch.full((SIZE,), float(source))


def encoded(source: int) -> EncodedImage:
    return EncodedImage("", [tensor(source)], [[tensor(-source)]])


def test_what_leaves_the_device_is_kept_on_the_host_and_never_encoded_again() -> None:
    for make, size in ((tensor, 4 * SIZE), (encoded, 8 * SIZE)):
        work, calls = Work(), []
        cache = FeatureCache(lambda sources: [calls.append(s) or make(s) for s in sources], Budget(3 * size, 5 * size), work)  # noqa: B023, E501  # fmt: skip
        for turn in range(3):
            for key in range(8):
                value = cache.get({key: key})[key]
                first = value if isinstance(value, torch.Tensor) else value.pooled[0]
                assert torch.equal(first, tensor(key)), turn
        assert sorted(calls) == list(range(8)) and work.images == 8
        assert cache.bytes <= 3 * size and cache.spilled_bytes <= 5 * size
        assert len(cache.held) == 3 and len(cache.spilled) == 5


def test_beyond_both_budgets_the_least_recently_used_is_encoded_again() -> None:
    calls: list[int] = []
    cache = FeatureCache(lambda sources: [calls.append(s) or tensor(s) for s in sources], Budget(800, 800), Work())
    for key in (0, 1, 2, 3, 4, 0):
        cache.get({key: key})
    assert calls == [0, 1, 2, 3, 4, 0] and cache.bytes <= 800 and cache.spilled_bytes <= 800


def test_without_a_host_budget_nothing_is_spilled() -> None:
    cache = FeatureCache(lambda sources: [tensor(s) for s in sources], 800, Work())
    for key in range(5):
        cache.get({key: key})
    assert not cache.spilled and len(cache.held) == 2


def test_the_default_follows_free_memory(monkeypatch) -> None:
    gib, cpu, gpu = 2**30, torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(memory, "host_free", lambda: 100 * gib)
    monkeypatch.setattr(memory, "device_free", lambda device: 60 * gib if device.type == "cuda" else 100 * gib)
    assert image_budget(cpu, 256) == Budget(256 << 20)
    assert image_budget(cpu, 0) == Budget(50 * gib)
    assert image_budget(gpu, 0) == Budget(int(0.35 * 60 * gib), 50 * gib)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert image_budget(gpu, 0).host == 12.5 * gib


def test_free_memory_is_read_from_the_machine() -> None:
    assert 0 < memory.host_free() <= memory.psutil.virtual_memory().total


FAULTS = """
import resource, sys, torch
from open_mmicl.memory import keep_freed

assert sys.argv[1] == "glibc's own" or keep_freed()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in range(1, 30):  # larger than all before: glibc maps each alone and returns it when it is freed
    torch.ones(size << 18)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_a_pass_frees_the_next_one_takes() -> None:
    """Pages of blocks of 1 to 29 MiB, one after the other: cleared by the system for each block, or once."""
    faults = {
        who: int(subprocess.run([sys.executable, "-c", FAULTS, who], capture_output=True, text=True, check=True).stdout)
        for who in ("glibc's own", "kept")
    }
    assert faults["kept"] < 0.5 * faults["glibc's own"]
