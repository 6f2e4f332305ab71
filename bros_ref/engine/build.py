"""Puts a live system together: model, pool, latency model, policy, engine. Each part can also be built on its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bros_ref.clock import Clock, WallClock
from bros_ref.config import HOST_BLOCKS_PER_BLOCK, KVCacheConfig, ModelConfig, cdiv
from bros_ref.cpu.linear import FastestLinear
from bros_ref.engine.assemble import RunnerFacts, assemble_engine
from bros_ref.engine.kv_dtype import fp8_scales, storage_dtype
from bros_ref.engine.llm_engine import LLMEngine
from bros_ref.engine.model_runner import Model, ModelRunner
from bros_ref.engine.ranks import RankFailed, Ranks, TensorParallelRunner
from bros_ref.environment import available_memory_bytes, compute_device
from bros_ref.kv_cache.storage import FP8
from bros_ref.model.attention import AttentionFn, paged_attention
from bros_ref.model.backends import attention_backend
from bros_ref.model.checksum import ChecksumModel
from bros_ref.model.decoder import Decoder
from bros_ref.model.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from bros_ref.model.weights.load import load_model_config, load_weights
from bros_ref.model.weights.parameters import Parameters
from bros_ref.request import Request, SamplingParams
from bros_ref.scheduler.latency_model import StepLatencyModel
from bros_ref.trace.trace import Trace
from bros_ref.workload.generate import WorkloadItem

MEMORY_SHARE = 0.25  # of the free host memory, for a KV pool there; the same again for the checkpoint store
GPU_MEMORY_SHARE = 0.9  # of a GPU's whole memory, for weights and KV pool together


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, its tokenizer, and the name under which it was requested."""

    name: str
    model: Model
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype
    parameters: Parameters
    backend: str = "torch"
    ranks: Ranks | None = None  # the processes that hold the rest of a model that is split

    @property
    def config(self) -> ModelConfig:
        """The model's shape; if the model is split, the part that one rank holds."""
        return self.model.config


@dataclass(frozen=True)
class LiveSettings:
    """Sizes of a live run. `chunked_prefill` None: the policy's own default, off for BROS. `rt_slowdown`: see
    `SchedulerConfig`. `kv_dtype`: see `engine/kv_dtype.py`."""

    kv_blocks: int = 256
    block_size: int = 16
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 256
    chunked_prefill: bool | None = None
    seed: int = 0
    rt_slowdown: float | None = None
    kv_dtype: str = "auto"


def load_model(name: str, device: str = "auto", seed: int = 0, backend: str = "auto", tp: int = 1) -> LoadedModel:
    """Loads a model by the names of `bros-ref --model`, with the attention of a backend (`model/backends.py`), split
    over `tp` devices of this machine: processes on a CPU, GPUs otherwise.

    Raises:
        WeightsError: see `bros_ref.model.weights.load`.
        ValueError: an unknown device, or "cuda" without a CUDA device; a backend that is unknown, does not fit the
            device or is not installed; not enough memory.
    """
    device = compute_device(device)
    if name == "checksum":
        if tp != 1:
            raise ValueError(f"the checksum model has no weights to split: tp must be 1, got {tp}")
        return LoadedModel(name, ChecksumModel(), ByteTokenizer(), torch.device("cpu"), torch.int64, {})
    dtype = half_precision() if device == "cuda" else torch.float32
    try:
        attention = attention_backend(backend, device)
    except RuntimeError as error:  # "cupy" where it cannot be used
        raise ValueError(f"--backend {backend}: {error}") from error
    config, tokenizer = load_model_config(name), load_tokenizer(name)
    used = "torch" if attention is paged_attention else "cupy" if device == "cuda" else "cpu-emulated"
    try:
        if tp > 1:
            ranks = Ranks(name, tp, device, dtype, seed, backend)
            return LoadedModel(name, ranks.model, tokenizer, ranks.device, dtype, ranks.parameters, used, ranks)
        parameters = load_weights(name, dtype, device, seed)
        model = _make_decoder(config, parameters, dtype, device, attention)
    except RankFailed:
        raise
    except (MemoryError, RuntimeError, OverflowError) as error:  # what torch raises for more than there is
        raise ValueError(f"model {name!r} cannot be put into the memory of {device}: "
                         f"{str(error).splitlines()[0]}") from error
    return LoadedModel(name, model, tokenizer, torch.device(device), dtype, parameters, used)


def _make_decoder(config: ModelConfig, parameters: Parameters, dtype: torch.dtype, device: str,
                  attention: AttentionFn) -> Decoder:
    """A `KernelDecoder` if attention uses our kernels and the fused ones support the model; else a `Decoder`."""
    if attention is not paged_attention:
        from bros_ref.gpu.attention import KernelAttention
        from bros_ref.gpu.decoder import KernelDecoder, why_not_fused

        if isinstance(attention, KernelAttention) and why_not_fused(config, dtype) is None:
            return KernelDecoder(config, parameters, dtype, device, attention)
    return Decoder(config, parameters, dtype, device, attention, FastestLinear(parameters.values()))


def half_precision() -> torch.dtype:
    """The 16-bit dtype for this GPU: bf16 if its tensor cores support it (sm_80 and later), because fp16 overflows in
    some models trained in bf16; otherwise fp16."""
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def blocks_that_fit(loaded: LoadedModel, block_size: int, max_num_seqs: int, kv_dtype: str = "auto") -> int:
    """The KV blocks that the device's memory leaves room for, but no more than `max_num_seqs` sequences of the model's
    full context fill, and at least one."""
    if loaded.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(loaded.device)
        room = free - (1 - GPU_MEMORY_SHARE) * total
    else:
        room = MEMORY_SHARE * available_memory_bytes()
    useful = max_num_seqs * cdiv(loaded.config.max_context_tokens, block_size)
    return max(1, min(useful, int(room // _block_bytes(loaded, block_size, kv_dtype))))


def host_blocks_that_fit(loaded: LoadedModel, block_size: int, kv_dtype: str = "auto") -> int:
    """The blocks of a checkpoint store that a share of the free host memory holds."""
    return int(MEMORY_SHARE * available_memory_bytes() // _block_bytes(loaded, block_size, kv_dtype))


def _block_bytes(loaded: LoadedModel, block_size: int, kv_dtype: str) -> int:
    return block_size * loaded.config.kv_elements_per_token * storage_dtype(kv_dtype, loaded.dtype).itemsize


def make_runner(loaded: LoadedModel, settings: LiveSettings) -> ModelRunner:
    """A runner with a KV pool of its own, and a host store of HOST_BLOCKS_PER_BLOCK times its size if a quarter of the
    free host memory holds that many.

    Raises:
        ValueError: the model cannot have K and V of `settings.kv_dtype`.
    """
    dtype = storage_dtype(settings.kv_dtype, loaded.dtype)
    if dtype == FP8 and loaded.backend != "torch" and loaded.config.head_dim % 16:
        raise ValueError(f"the kernels load K and V in pieces of 16 bytes: an fp8 KV cache needs a head_dim that is a "
                         f"multiple of 16, not {loaded.config.head_dim}; use --kv-dtype auto, or --backend torch")
    host_blocks = min(HOST_BLOCKS_PER_BLOCK * settings.kv_blocks,
                      host_blocks_that_fit(loaded, settings.block_size, settings.kv_dtype))
    runner = _runner(loaded, KVCacheConfig(settings.kv_blocks, settings.block_size, host_blocks), dtype)
    if dtype == FP8:
        runner.kv.scales = fp8_scales(loaded.model)
    return runner


def _runner(loaded: LoadedModel, kv_config: KVCacheConfig, dtype: torch.dtype) -> ModelRunner:
    if loaded.ranks is not None:
        if dtype == FP8:
            raise ValueError("a model that is split over devices cannot have an fp8 KV cache here; use tp=1 or auto")
        return TensorParallelRunner(loaded.ranks, kv_config, loaded.dtype, loaded.backend)
    if loaded.backend != "torch":
        from bros_ref.gpu.decoder import KernelDecoder
        from bros_ref.gpu.runner import KernelRunner

        if isinstance(loaded.model, KernelDecoder):
            return KernelRunner(loaded.model, kv_config, loaded.device, dtype, loaded.backend)
    return ModelRunner(loaded.model, kv_config, loaded.device, dtype, loaded.backend)


def make_engine(policy: str, loaded: LoadedModel, runner: ModelRunner, settings: LiveSettings,
                latency: StepLatencyModel | None = None, clock: Clock | None = None,
                trace_type: type[Trace] | None = Trace) -> LLMEngine:
    """An engine for one run of one policy, with a trace. Runs may share a runner, one after the other. Without a
    latency model it learns step times from its first steps on (`assemble_engine`).

    Raises:
        ValueError: unknown policy.
    """
    facts = RunnerFacts(loaded.name, str(loaded.device), runner.kv.slot_bytes, loaded.config.max_context_tokens,
                        loaded.config.eos_token_ids, loaded.config.vocab_size)
    return assemble_engine(policy, runner, facts, runner.kv.config, settings, clock or WallClock(), latency=latency,
                           tokenizer=loaded.tokenizer, trace_type=trace_type,
                           environment={"threads": torch.get_num_threads(), "backend": loaded.backend,
                                        "kv_dtype": str(runner.kv.data.dtype).removeprefix("torch.")})


def request_from_item(item: WorkloadItem, loaded: LoadedModel, seed: int = 0, *, to_length: bool = True) -> Request:
    """A request for a workload item: its text through the chat template, or random tokens of its length.

    `to_length` ignores EOS, so that the output has the item's length, as the traces want it.
    """
    if item.prompt is not None:
        prompt = loaded.tokenizer.chat(item.prompt)
    else:
        rng = np.random.default_rng([seed, *item.request_id.encode()])
        prompt = rng.integers(3, loaded.config.vocab_size, item.prompt_tokens).tolist()
    return Request(item.request_id, item.request_class, prompt,
                   SamplingParams(max_tokens=item.output_tokens, ignore_eos=to_length), item.arrival_s, item.slo)
