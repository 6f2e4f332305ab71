"""The loop: schedule, execute, update, record; and what a live system is made of."""

from bros_ref.engine.llm_engine import (
    EngineStalled,
    LLMEngine,
    OnText,
    RequestRefused,
    RequestsFailed,
    Runner,
    StepFailed,
)

__all__ = [
    "EngineStalled",
    "LLMEngine",
    "OnText",
    "RequestRefused",
    "RequestsFailed",
    "Runner",
    "StepFailed",
]
