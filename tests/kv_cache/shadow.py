"""A slot-by-slot shadow of the KV pool: executes the ordered copies and writes on plain dicts and says at once when a
request would read a lost, stale or foreign token. Written without looking at how the managers account."""

from __future__ import annotations

import random

from bros_ref.kv_cache.manager import KVCacheManager
from bros_ref.request import SLO, Request, RequestClass, SamplingParams

Token = tuple[str, int]


def make_request(name: str, is_rt: bool, prompt_tokens: int = 1, max_tokens: int = 10_000) -> Request:
    return Request(name, RequestClass.REAL_TIME if is_rt else RequestClass.BEST_EFFORT, [1] * prompt_tokens,
                   SamplingParams(max_tokens=max_tokens), slo=SLO(1.0, 1.0) if is_rt else None)


class ShadowMemory:
    """What each device and host slot holds, after the copies and writes that the manager ordered."""

    def __init__(self, manager: KVCacheManager) -> None:
        self.manager = manager
        self.device: dict[int, Token] = {}
        self.host: dict[int, Token] = {}
        self.length: dict[str, int] = {}  # tokens written so far

    def slot(self, request: Request, position: int) -> int:
        size = self.manager.block_size
        block = self.manager.block_table(request.request_id)[position // size]
        assert block >= 0, f"{request.request_id} would read token {position} from the host"
        offset = position % size
        return block * size + (offset if request.is_rt else size - 1 - offset)

    def run_step(self, scheduled: list[tuple[Request, int]]) -> None:
        """Copies in the promised order, then each scheduled request writes its new tokens, then all of them read."""
        copies = self.manager.take_changes().copies
        for pairs in (copies.checkpoint, copies.relocate, copies.restore):
            destinations = [to for _, to in pairs]
            assert len(set(destinations)) == len(destinations), "two copies into one slot in one phase"
        for source, target in copies.checkpoint:
            self.host[target] = self.device[source]
        moved = [(target, self.device[source]) for source, target in copies.relocate]
        self.device.update(moved)
        for source, target in copies.restore:
            self.device[target] = self.host[source]
        for request, count in scheduled:
            start = self.length.get(request.request_id, 0)
            for position in range(start, start + count):
                self.device[self.slot(request, position)] = (request.request_id, position)
            self.length[request.request_id] = start + count
        for request, _ in scheduled:
            for position in range(self.length[request.request_id]):
                found = self.device[self.slot(request, position)]
                assert found == (request.request_id, position), f"{request.request_id}[{position}] reads {found}"

    def forget(self, request: Request) -> None:
        self.length.pop(request.request_id, None)


def random_life(manager: KVCacheManager, rng: random.Random, steps: int, largest: int) -> dict[str, int]:
    """A random life of the pool, checked after every operation. Returns how often each interesting thing happened."""
    memory, live, seen = ShadowMemory(manager), [], dict.fromkeys(
        ("grown", "refused", "reclaimed", "swapped", "freed", "checkpoint", "relocate", "restore", "shared"), 0)
    for step in range(steps):
        if rng.random() < 0.4:
            live.append(make_request(f"{'rt' if rng.random() < 0.5 else 'be'}{step}", rng.random() < 0.5))
        rng.shuffle(live)
        be = [r for r in live if not r.is_rt and memory.length.get(r.request_id)]
        manager.begin_step(be)
        scheduled: list[tuple[Request, int]] = []
        for request in sorted(live, key=lambda r: not r.is_rt):
            if rng.random() < 0.35:
                continue
            count = 1 if memory.length.get(request.request_id) and rng.random() < 0.7 else rng.randint(1, largest)
            before = manager.snapshot()
            table = manager.allocate_slots(request, count)
            if table is None:
                assert manager.snapshot() == before, "refused, yet something changed"
                seen["refused"] += 1
                if not request.is_rt and manager.reclaim(request, count):
                    seen["reclaimed"] += 1
                    manager.check_integrity()
                    table = manager.allocate_slots(request, count)
                    assert table is not None, "reclaim promised room"
            if table is not None:
                scheduled.append((request, count))
                seen["grown"] += 1
            manager.check_integrity()
        running = {r.request_id for r, _ in scheduled}
        idle = [r for r in live if r.request_id not in running and memory.length.get(r.request_id)]
        if idle and rng.random() < 0.1:
            seen["swapped"] += manager.swap_out(rng.choice(idle).request_id)
            manager.check_integrity()
        seen["shared"] += sum(view.state == "shared" for view in manager.snapshot())
        copies = manager._changes.copies
        for kind in ("checkpoint", "relocate", "restore"):
            seen[kind] += len(getattr(copies, kind))
        memory.run_step(scheduled)
        if live and rng.random() < 0.3:  # a request ends or is aborted, in whatever state it is
            gone = live.pop(rng.randrange(len(live)))
            manager.free(gone.request_id)
            memory.forget(gone)
            seen["freed"] += 1
            manager.check_integrity()
    for request in live:
        manager.free(request.request_id)
        manager.check_integrity()
    assert manager.num_used_blocks == 0
    return seen
