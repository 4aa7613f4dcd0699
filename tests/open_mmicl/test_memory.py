"""The feature cache spills to the host's memory, and its default follows free memory."""

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
