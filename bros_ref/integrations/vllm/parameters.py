"""What users of the vLLM integration can set: the class and targets of a request, and the scheduler's settings.

A request sets them in `vllm_xargs` of the HTTP body, which vLLM passes on as `extra_args` of its `SamplingParams`:

    bros_class                "rt" or "be"; if omitted, "rt" if a target is given, otherwise "be"
    ttft_slo_s, tpot_slo_s    targets of a real-time request, in seconds; if omitted, the settings' defaults

The server sets the rest with `--additional-config '{"bros": {"rt_slowdown": 2}}'`; see `Settings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from bros_ref.request import SLO, RequestClass

CLASSES = {cls.value: cls for cls in RequestClass}


@dataclass(frozen=True)
class Settings:
    """Settings of the scheduler, with the paper's targets as defaults.

    Attributes:
        ttft_slo_s, tpot_slo_s: default targets of real-time requests, in seconds.
        be_max_wait_steps: N in the bound on how long best-effort requests wait; see `scheduler/bros.py`.
        rt_slowdown: best-effort requests may make the latency of real-time ones at most about this many times what it
            is without them; None: only the deadlines bound it.
        latency: coefficients of the latency model from an earlier fit; None: the model learns from the first steps.
    """

    ttft_slo_s: float = 0.4
    tpot_slo_s: float = 0.2
    be_max_wait_steps: int = 128
    rt_slowdown: float | None = None
    latency: tuple[float, float, float, float] | None = None

    @classmethod
    def read(cls, additional_config: object) -> Settings:
        """From vLLM's `additional_config`, of which only the key "bros" is looked at.

        Raises:
            ValueError: a key is unknown; the message lists the known ones. Invalid values are refused where they apply.
        """
        given = additional_config.get("bros", {}) if isinstance(additional_config, Mapping) else {}
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or not set(given) <= set(known):
            raise ValueError('additional_config["bros"] must be an object with keys among '
                             f"{', '.join(known)}; got {given!r}")
        SLO(given.get("ttft_slo_s", cls.ttft_slo_s), given.get("tpot_slo_s", cls.tpot_slo_s))
        return cls(**given)


def class_and_slo(arguments: Mapping[str, Any] | None, settings: Settings) -> tuple[RequestClass, SLO | None]:
    """The class of a request, and its targets if it is real-time. Other keys of `arguments` are ignored.

    Raises:
        ValueError: the class is unknown, a target is not a positive number, or a best-effort request has a target.
    """
    arguments = arguments or {}
    targets = {key: arguments[key] for key in ("ttft_slo_s", "tpot_slo_s") if arguments.get(key) is not None}
    name = arguments.get("bros_class") or ("rt" if targets else "be")
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"bros_class must be {' or '.join(CLASSES)}, got {name!r}")
    if name == "be":
        if targets:
            raise ValueError(f"a best-effort request has no targets; leave out {' and '.join(targets)}, or set "
                             'bros_class to "rt"')
        return RequestClass.BEST_EFFORT, None
    for key, value in targets.items():
        try:
            targets[key] = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{key} must be a positive number of seconds, got {value!r}") from None
    return RequestClass.REAL_TIME, SLO(targets.get("ttft_slo_s", settings.ttft_slo_s),
                                       targets.get("tpot_slo_s", settings.tpot_slo_s))
