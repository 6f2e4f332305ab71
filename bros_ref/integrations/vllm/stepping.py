"""Runs a vLLM scheduler class step by step without a model, on a modelled clock, to measure and test its decisions.

`ChecksumRunner` replaces vLLM's model runner. It stores the token of every KV slot, follows the block tables that the
scheduler sends, and "samples" a checksum of what it reads back through them. A request gets the same tokens as alone if
and only if no block was lost, mixed up, or reused too early.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.config import CacheConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from bros_ref.integrations.vllm.connector import HostKVConnector

VOCAB_SIZE = 30_000
_MODEL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": 64,
          "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
          "max_position_embeddings": 8192}  # a config that vLLM accepts; no weights are ever loaded


@dataclass(frozen=True)
class Pool:
    """The limits of a scheduler. `max_num_batched_tokens` is per step; without host blocks there is no connector."""

    max_num_seqs: int = 8
    max_num_batched_tokens: int = 256
    num_blocks: int = 200
    block_size: int = 16
    prefix_caching: bool = False
    max_model_len: int = 2048
    num_host_blocks: int = 0


def next_token(tokens: Sequence[int]) -> int:
    """The token that `ChecksumRunner` samples after `tokens`."""
    return zlib.crc32(np.asarray(tokens, dtype=np.int64).tobytes()) % VOCAB_SIZE


class ChecksumRunner:
    """Executes a `SchedulerOutput`; see the module's docstring. `connector`: the worker's side of a KV connector."""

    def __init__(self, pool: Pool, connector: HostKVConnector | None = None) -> None:
        self._block_size, self.connector = pool.block_size, connector
        self._slots = np.full((pool.num_blocks + 1) * pool.block_size, -1, dtype=np.int64)
        if connector is not None:
            connector.register_kv_caches({"layer": torch.from_numpy(self._slots).view(-1, pool.block_size)})
        self._tokens: dict[str, list[int]] = {}
        self._tables: dict[str, list[int]] = {}

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Writes the scheduled tokens to their slots, then samples for requests whose known tokens are all computed."""
        if self.connector is not None:  # in the order of vLLM's model runner
            self.connector.handle_preemptions(step.kv_connector_metadata)
            self.connector.bind_connector_metadata(step.kv_connector_metadata)
            if step.has_sync_kv_loads:
                self.connector.start_load_kv(None)
        starts = {}
        for new in step.scheduled_new_reqs:
            self._tokens[new.req_id] = list(new.prefill_token_ids or new.prompt_token_ids)
            self._tables[new.req_id] = list(new.block_ids[0])
            starts[new.req_id] = new.num_computed_tokens
        cached = step.scheduled_cached_reqs
        for request_id, blocks, start in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens,
                                             strict=True):
            starts[request_id] = start
            if request_id in cached.resumed_req_ids:
                self._tables[request_id] = []
            if blocks is not None:
                self._tables[request_id] += blocks[0]
        counts = step.num_scheduled_tokens
        for request_id, count in counts.items():
            start = starts[request_id]
            computed = self._tokens[request_id][start:start + count]
            self._slots[self._slots_of(request_id, start, start + count)] = computed
        sampled = [self._sample(request_id, starts[request_id] + count) for request_id, count in counts.items()]
        for request_id in step.finished_req_ids:
            self._tokens.pop(request_id, None)
            self._tables.pop(request_id, None)
        return ModelRunnerOutput(req_ids=list(counts), req_id_to_index={name: i for i, name in enumerate(counts)},
                                 sampled_token_ids=sampled)

    def _sample(self, request_id: str, end: int) -> list[int]:
        tokens = self._tokens[request_id]
        if end < len(tokens):
            return []
        tokens.append(next_token(self._slots[self._slots_of(request_id, 0, end)].tolist()))
        return [tokens[-1]]

    def _slots_of(self, request_id: str, start: int, end: int) -> np.ndarray:
        positions = np.arange(start, end)
        return (np.asarray(self._tables[request_id])[positions // self._block_size] * self._block_size
                + positions % self._block_size)


@dataclass
class Served:
    """The outcome of one request. Times are in seconds on the modelled clock; `steps` are those in which it ran."""

    arrival_s: float
    prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class Stepper:
    """A scheduler of vLLM, a stand-in for the model, and a clock.

    Args:
        scheduler_cls: a subclass of vLLM's `Scheduler`.
        policy: vLLM's scheduling policy, "fcfs" or "priority".
        settings: the value of "bros" in `additional_config`.
        step_s: modelled seconds per step; `token_s` is added for each scheduled token. Copies take no time.
    """

    def __init__(self, scheduler_cls: type[Any], pool: Pool, policy: str = "fcfs",
                 settings: Mapping[str, Any] | None = None, step_s: float = 0.032, token_s: float = 0.0025,
                 is_async: bool = False) -> None:
        self.now_s, self.step_s, self.token_s = 0.0, step_s, token_s
        self.served, self.num_steps, self.num_tokens = dict[str, Served](), 0, 0
        config = _vllm_config(pool, policy, settings)
        config.scheduler_config.async_scheduling = is_async
        spec = FullAttentionSpec(block_size=pool.block_size, num_kv_heads=1, head_size=64, dtype=torch.float32)
        kv_cache_config = KVCacheConfig(pool.num_blocks + 1, [], [KVCacheGroupSpec(["layer"], spec)])
        self.scheduler = scheduler_cls(
            vllm_config=config, block_size=pool.block_size, structured_output_manager=StructuredOutputManager(config),
            kv_cache_config=kv_cache_config)
        self.runner = ChecksumRunner(pool, HostKVConnector(config, KVConnectorRole.WORKER, kv_cache_config)
                                     if pool.num_host_blocks else None)
        self.scheduler.clock = lambda: self.now_s
        hash_tokens = get_hash_fn_by_name("sha256")
        init_none_hash(hash_tokens)
        self._hasher = get_request_block_hasher(pool.block_size, hash_tokens) if pool.prefix_caching else None

    def add(self, request_id: str, prompt: Sequence[int], max_tokens: int, priority: int = 0,
            arrival_s: float | None = None, json_schema: str | None = None, **arguments: Any) -> None:
        """Adds a request now; it may have arrived earlier, during a step. `arguments`: its `vllm_xargs`."""
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=0, extra_args=arguments or None,
            structured_outputs=StructuredOutputsParams(json=json_schema) if json_schema else None)
        self.served[request_id] = Served(self.now_s if arrival_s is None else arrival_s, len(prompt))
        self.scheduler.add_request(Request(
            request_id, list(prompt), sampling, None, arrival_time=self.served[request_id].arrival_s,
            priority=priority, block_hasher=self._hasher))

    def step(self) -> SchedulerOutput:
        """Schedules, executes and updates once; the clock advances by the modelled time."""
        scheduled = self.scheduler.schedule()
        self.num_steps += 1
        self.update(scheduled)
        return scheduled

    def update(self, scheduled: SchedulerOutput) -> None:
        """The second half of a step, after its `schedule`."""
        model_output = self.runner.execute(scheduled)
        self.num_tokens += scheduled.total_num_scheduled_tokens
        if scheduled.num_scheduled_tokens:
            self.now_s += self.step_s + self.token_s * scheduled.total_num_scheduled_tokens
        for outputs in self.scheduler.update_from_output(scheduled, model_output).values():
            for result in outputs.outputs:
                served = self.served[result.request_id]
                served.token_ids += result.new_token_ids
                served.token_s += [self.now_s] * len(result.new_token_ids)
                served.finish_reason = None if result.finish_reason is None else str(result.finish_reason)
        for request_id in scheduled.num_scheduled_tokens:
            self.served[request_id].steps.append(self.num_steps)

    @property
    def num_free_blocks(self) -> int:
        """Blocks of vLLM's pool that no request holds."""
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    @property
    def num_recomputed_tokens(self) -> int:
        """Tokens that were computed more than once, given that all requests have finished and share no prefix."""
        needed = sum(served.prompt_tokens + len(served.token_ids) - 1 for served in self.served.values())
        return self.num_tokens - needed


def _vllm_config(pool: Pool, policy: str, settings: Mapping[str, Any] | None) -> VllmConfig:
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/config.json", "w") as file:
            json.dump(_MODEL, file)
        model = ModelConfig(model=folder, skip_tokenizer_init=True, dtype="float32", max_model_len=pool.max_model_len)
        cache = CacheConfig(block_size=pool.block_size, enable_prefix_caching=pool.prefix_caching)
        cache.num_gpu_blocks = pool.num_blocks + 1  # vLLM keeps one as its null block
        transfer = KVTransferConfig(
            kv_connector="HostKVConnector", kv_connector_module_path="bros_ref.integrations.vllm.connector",
            kv_role="kv_both", kv_connector_extra_config={"num_host_blocks": pool.num_host_blocks})
        return VllmConfig(
            model_config=model, cache_config=cache, additional_config={"bros": dict(settings or {})},
            kv_transfer_config=transfer if pool.num_host_blocks else None,
            scheduler_config=SchedulerConfig(
                max_num_seqs=pool.max_num_seqs, max_num_batched_tokens=pool.max_num_batched_tokens,
                max_model_len=pool.max_model_len, policy=policy, enable_chunked_prefill=True,
                is_encoder_decoder=False))
