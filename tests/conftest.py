"""Settings for every test: one torch thread, one hypothesis profile, and a run that ends when one of its workers dies.

A run draws the same random data as the run before, so that a failure can be repeated and a green run stays green;
BROS_REF_FRESH=1 draws new data (`make soak` does). The random lives of the engine draw new ones always.

A test that crashes its process, or hangs until `timeout` of pyproject.toml kills the process, takes a pytest-xdist
worker with it. By default pytest-xdist starts another one or finishes what is queued; here the run ends at once, with
exit status 1 and the name of the test that ran.
"""

import os
import signal

import pytest
from hypothesis import HealthCheck, Phase, settings

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported, later, by the tests that need it
settings.register_profile(
    "bros_ref", deadline=None, print_blob=True, derandomize=not os.environ.get("BROS_REF_FRESH"),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("bros_ref")
# `make mutation`: the same examples for every mutant, and none of the time that it takes to shrink a failing one.
settings.register_profile(
    "mutation", settings.get_profile("bros_ref"), derandomize=True, database=None,
    phases=[Phase.explicit, Phase.generate])
# A shell has the jobs that it starts in the background ignore Ctrl-C, and child processes inherit that. Tests send
# SIGINT to themselves and to their children, so they take it however the run was started.
signal.signal(signal.SIGINT, signal.default_int_handler)

DEAD_WORKERS = pytest.StashKey[list[str]]()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Called in the main process when a worker is gone; `error` says why, None at the regular end."""
    if error is not None:
        node.config.stash.setdefault(DEAD_WORKERS, []).append(node.gateway.id)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    """Ends the run once the test that killed its worker is reported (pytest-xdist names its phase "???")."""
    if report.when == "???":
        others = report.node.config.pluginmanager.getplugin("dsession").nodemanager.group
        others.terminate(timeout=0.5)  # pytest-xdist would let them finish the test they are in
        pytest.exit(report.longrepr)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """The exit status after a death is that of a failed test, also when the worker died between two tests."""
    if session.config.stash.get(DEAD_WORKERS, []):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
