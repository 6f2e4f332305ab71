"""A KV connector for `BROSScheduler` that keeps the KV of preempted best-effort requests in host memory.

    vllm serve MODEL --scheduler-cls bros_ref.integrations.vllm.BROSScheduler --kv-transfer-config '{
        "kv_connector": "HostKVConnector", "kv_connector_module_path": "bros_ref.integrations.vllm.connector",
        "kv_role": "kv_both", "kv_connector_extra_config": {"num_host_blocks": 1000}}'

vLLM makes two instances. The one in the scheduler decides what to copy; the one in each worker copies:

    1. preempt    `BROSScheduler` calls `save`, and vLLM frees the request's blocks at once
    2. next step  before the forward pass may overwrite them, the worker copies these blocks to the host store
    3. resume     `get_num_new_matched_tokens` tells vLLM how many tokens need not be recomputed; the worker copies them
                  into the request's new blocks before the forward pass that reads them

vLLM's own offloading copies asynchronously what every request computes, and does not run on CPUs. Here the copies are
synchronous, and only what is preempted is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from bros_ref.integrations.vllm.host_store import Copies, HostStore


@dataclass
class CopyMetadata(KVConnectorMetadata):  # type: ignore[misc]  # vLLM has no types where it is not installed
    """What the scheduler's instance sends to the workers' instances in each step."""

    copies: Copies


class HostKVConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """See the module's docstring.

    Raises:
        ValueError: `num_host_blocks` is not a positive integer, `kv_role` is not "kv_both", or the first dimension of
            the KV cache is not the block.
    """

    requires_kv_delivery = False  # a request whose KV was not saved is recomputed

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        config = vllm_config.kv_transfer_config
        if config.kv_role != "kv_both":
            raise ValueError(f'HostKVConnector needs "kv_role": "kv_both", got {config.kv_role!r}')
        size = config.kv_connector_extra_config.get("num_host_blocks")
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError('HostKVConnector needs "kv_connector_extra_config": {"num_host_blocks": N}, where N >= 1 '
                             f"is the size of the host store in blocks; got {size!r}")
        self.store = HostStore(size, vllm_config.cache_config.block_size)
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []  # vLLM's KV and the host store of each layer

    # -- in the scheduler -------------------------------------------------------------------------------------

    def save(self, request: Request, block_ids: Sequence[int]) -> None:
        """Called by `BROSScheduler` before vLLM frees the blocks of a best-effort request that is preempted."""
        self.store.save(request.request_id, block_ids, request.num_computed_tokens)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens behind the `num_computed_tokens` that vLLM has can be copied back. At least the last token is
        always computed, because its output is needed. False: the copy is done in the step that resumes the request.
        """
        return max(0, self._usable_tokens(request) - num_computed_tokens), False

    def _usable_tokens(self, request: Request) -> int:
        if request.skip_reading_prefix_cache:
            return 0
        return min(self.store.num_tokens(request.request_id), int(request.num_tokens) - 1)

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """Plans the copy of a request that is resumed. Whether it needed one or not, its host blocks are free then."""
        if num_external_tokens > 0:
            end = self._usable_tokens(request)
            self.store.load(request.request_id, blocks.get_block_ids()[0], end - num_external_tokens, end)
        self.store.free(request.request_id)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> CopyMetadata:
        """The copies of this step."""
        return CopyMetadata(self.store.take_copies())

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, None]:
        """Frees the host blocks of a request that ended or was aborted; vLLM may free its own blocks at once."""
        self.store.free(request.request_id)
        return False, None

    def request_finished_all_groups(self, request: Request, block_ids: tuple[list[int], ...]) -> tuple[bool, None]:
        """The same; `BROSScheduler` refuses models with several groups of KV cache."""
        return self.request_finished(request, [])

    def reset_cache(self) -> bool:
        """Forgets what is stored, for example because the weights have changed."""
        self.store.clear()
        return True

    # -- in the workers ---------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Allocates the host store: per layer the same tensor as vLLM's, with `num_host_blocks` blocks."""
        num_blocks, self._layers = self._kv_cache_config.num_blocks, []
        for name, cache in kv_caches.items():
            if cache.shape[0] % num_blocks:
                raise ValueError(f"HostKVConnector needs KV caches whose first dimension is the block; {name} has the "
                                 f"shape {list(cache.shape)} for {num_blocks} blocks")
            by_block = cache.view(num_blocks, -1, *cache.shape[1:])  # kernels may divide a block into smaller ones
            host = torch.empty((self.store.num_blocks, *by_block.shape[1:]), dtype=cache.dtype, device="cpu")
            self._layers.append((by_block, host))

    def handle_preemptions(self, kv_connector_metadata: CopyMetadata) -> None:
        """Copies preempted requests to the host; vLLM calls this before anything can overwrite their blocks."""
        if kv_connector_metadata.copies.saves:
            pool_ids, host_ids = torch.tensor(kv_connector_metadata.copies.saves).T
            for cache, host in self._layers:
                host[host_ids] = cache[pool_ids.to(cache.device)].to(host.device)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Copies resumed requests back; vLLM calls this before the forward pass that reads them."""
        if loads := self._get_connector_metadata().copies.loads:
            pool_ids, host_ids = torch.tensor(loads).T
            for cache, host in self._layers:
                cache[pool_ids.to(cache.device)] = host[host_ids].to(cache.device)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All copies have been made when the forward pass starts."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved before its request is preempted."""

    def wait_for_save(self) -> None:
        """Saves are made in `handle_preemptions`."""
