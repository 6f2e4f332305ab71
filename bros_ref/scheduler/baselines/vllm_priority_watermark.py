"""vLLM V1 with `--scheduling-policy priority` and a watermark: admission keeps 1 % of the blocks free.

As `vllm_priority.py` otherwise. Running requests grow into the blocks that are kept free, so fewer
of them are preempted and recomputed (the watermark is vLLM's; `vllm_v0.py` has the same).
"""

from __future__ import annotations

from bros_ref.request import Request
from bros_ref.scheduler.baselines.vllm_priority import VLLMPriorityScheduler
from bros_ref.scheduler.baselines.vllm_v0 import leaves_watermark


class VLLMPriorityWatermarkScheduler(VLLMPriorityScheduler):
    """Static priority by class; admission keeps blocks free for running requests."""

    def can_admit(self, request: Request) -> bool:
        kv = self.kv
        return super().can_admit(request) and (not self.running or leaves_watermark(
            kv.blocks_for(request.num_tokens), kv.num_free_blocks, kv.config.num_blocks))
