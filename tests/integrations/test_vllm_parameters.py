"""What needs no vLLM: reading a request's class and targets, the settings, and the check of vLLM's interface."""

import importlib
import importlib.util

import pytest

from bros_ref.integrations import vllm as integration
from bros_ref.integrations.vllm.parameters import Settings, class_and_slo
from bros_ref.request import SLO, RequestClass

RT, BE = RequestClass.REAL_TIME, RequestClass.BEST_EFFORT
SETTINGS = Settings(ttft_slo_s=0.7, tpot_slo_s=0.3)


@pytest.mark.parametrize(("arguments", "expected"), [
    (None, (BE, None)), ({}, (BE, None)), ({"session_id": "x"}, (BE, None)), ({"bros_class": "be"}, (BE, None)),
    ({"bros_class": "rt"}, (RT, SLO(0.7, 0.3))), ({"ttft_slo_s": 0.2}, (RT, SLO(0.2, 0.3))),
    ({"bros_class": "rt", "tpot_slo_s": "0.1"}, (RT, SLO(0.7, 0.1))),
    ({"bros_class": None, "ttft_slo_s": None}, (BE, None)),
])
def test_class_and_targets(arguments, expected):
    assert class_and_slo(arguments, SETTINGS) == expected


@pytest.mark.parametrize(("arguments", "message"), [
    ({"bros_class": "fast"}, "bros_class must be rt or be"), ({"bros_class": ["rt"]}, "bros_class must be rt or be"),
    ({"bros_class": 1}, "bros_class must be rt or be"),
    ({"bros_class": "be", "tpot_slo_s": 1}, "leave out tpot_slo_s"),
    ({"ttft_slo_s": "soon"}, "ttft_slo_s must be a positive number"), ({"ttft_slo_s": [1]}, "ttft_slo_s"),
    ({"ttft_slo_s": 0}, "ttft_s must be a positive number"),
    ({"tpot_slo_s": "nan"}, "tpot_s must be a positive number"),
])
def test_arguments_that_make_no_sense_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        class_and_slo(arguments, SETTINGS)


def test_settings():
    assert Settings.read({}) == Settings.read({"other": 1}) == Settings()
    assert Settings.read({"bros": {"rt_slowdown": 2, "latency": (1, 2, 3, 4)}}).rt_slowdown == 2
    for wrong in ({"bros": {"slowdown": 2}}, {"bros": 3}):
        with pytest.raises(ValueError, match="ttft_slo_s, tpot_slo_s, be_max_wait_steps, rt_slowdown, latency"):
            Settings.read(wrong)
    with pytest.raises(ValueError, match="ttft_s must be a positive number"):
        Settings.read({"bros": {"ttft_slo_s": 0}})


class Complete:
    """Has everything of vLLM's scheduler that ours relies on."""

    def schedule(self, throttle_prefills=False): ...
    def update_from_output(self, scheduler_output, model_runner_output): ...
    def add_request(self, request): ...
    def _free_request(self, request, delay_free_blocks=False): ...
    def _preempt_request(self, request, timestamp, drop_stale_output=False): ...
    def _handle_blocked_waiting_request(self, request): ...
    def _reserve_prefill_lookahead(self, request, num_computed_tokens, num_new_tokens): ...
    @staticmethod
    def _is_blocked_waiting_status(status): ...


class Connector:
    """Has everything of vLLM's base class of KV connectors that ours relies on."""

    def register_kv_caches(self, kv_caches): ...
    def handle_preemptions(self, kv_connector_metadata): ...
    def start_load_kv(self, forward_context, **kwargs): ...
    def get_num_new_matched_tokens(self, request, num_computed_tokens): ...
    def update_state_after_alloc(self, request, blocks, num_external_tokens): ...
    def build_connector_meta(self, scheduler_output): ...
    def request_finished(self, request, block_ids): ...
    def reset_cache(self): ...


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.33.0", "0.33.0+cpu"])
def test_supported_releases(version):
    integration.check_interface(version, Complete, Connector)


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0", "0.3.2", "0.320.0", "1.0", "dev"])
def test_other_releases_are_refused_by_version(version):
    with pytest.raises(ImportError, match=rf"vLLM 0.32 and 0.33.*found {version}"):
        integration.check_interface(version, Complete, Connector)


@pytest.mark.parametrize("name", [name for cls in (Complete, Connector) for name in vars(cls) if name[:2] != "__"])
def test_a_modified_build_is_refused_by_what_it_lacks(name):
    for other in ({}, {name: lambda self: None}):  # without the method, and with one that takes other arguments
        scheduler, connector = (type("Changed", (), {
            key: other.get(key, value) for key, value in vars(cls).items() if key != name or key in other})
            for cls in (Complete, Connector))
        if name == "reset_cache" and other:
            continue  # it has no arguments
        with pytest.raises(ImportError, match=name):
            integration.check_interface("0.33.0", scheduler, connector)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_error_says_what_to_install():
    with pytest.raises(ImportError, match=r"needs vLLM 0\.32 or 0\.33"):
        _ = integration.BROSScheduler


def test_only_the_scheduler_is_offered():
    with pytest.raises(AttributeError):
        _ = integration.Scheduler
