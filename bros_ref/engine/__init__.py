"""The loop (schedule, execute, update, record) and the other parts of a live system."""

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
