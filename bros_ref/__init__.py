"""bros_ref: a readable, real implementation of BROS (arXiv 2504.09590).

    from bros_ref import LLM, SLO, SamplingParams
    LLM("smollm2").generate("The capital of France is", SamplingParams(max_tokens=16), slo=SLO(0.5, 0.1))

Each name below is imported when it is first used: importing the package loads neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bros_ref.engine.llm import LLM, RequestOutput
    from bros_ref.request import SLO, RequestClass, SamplingParams
    from bros_ref.simulator.simulation import Simulation, SimulationResult
    from bros_ref.trace.trace import Trace

__version__ = "0.1.0"
__all__ = ["LLM", "SLO", "RequestClass", "RequestOutput", "SamplingParams", "Simulation", "SimulationResult", "Trace"]

_HOMES = {"LLM": "engine.llm", "RequestOutput": "engine.llm", "SLO": "request", "RequestClass": "request",
          "SamplingParams": "request", "Simulation": "simulator.simulation",
          "SimulationResult": "simulator.simulation", "Trace": "trace.trace"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
