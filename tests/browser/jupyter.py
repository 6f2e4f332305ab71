"""A real JupyterLab on a copy of the notebooks, and a real Chromium that opens them; nothing leaves the machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
RUN_ALL = """async () => {
  const app = window.jupyterapp, panel = app.shell.currentWidget;
  const late = new Promise((_, fail) => setTimeout(() => fail(new Error('not run after 300 s')), 300_000));
  const run = async () => {
    await panel.context.ready;
    await panel.sessionContext.ready;
    await panel.sessionContext.session.kernel.info;
    await app.commands.execute('notebook:run-all-cells');
  };
  await Promise.race([run(), late]);
}"""
OUTPUTS = """() => window.jupyterapp.shell.currentWidget.content.widgets
  .filter(cell => cell.model.type === 'code')
  .map(cell => ({tags: cell.model.getMetadata('tags') || [], count: cell.model.executionCount,
                 outputs: cell.model.outputs.toJSON()}))"""

SHUT_DOWN = """async () => {
  await window.jupyterapp.shell.currentWidget.sessionContext.shutdown();
}"""
RESTART = """async () => {
  await window.jupyterapp.shell.currentWidget.sessionContext.restartKernel();
}"""
SILENT = "the kernel is busy or gone. If the kernel is gone, run the cell again."
GONE = "The kernel is gone: run the cell again."


def why_not() -> str | None:
    """Why no browser test can run here; None if they can."""
    if CHROMIUM is None:
        return "no chromium is installed"
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed"
    return None


@contextlib.contextmanager
def jupyter_lab(folder: Path) -> Iterator[str]:
    """Serves a copy of the notebooks from `folder`; gives the address."""
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    settings = folder / "share" / "lab" / "settings"
    settings.mkdir(parents=True)
    (settings / "overrides.json").write_text(json.dumps({  # cells off screen are in the page too
        "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"}}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--IdentityProvider.token=", "--ServerApp.password=", "--ServerApp.disable_check_xsrf=True",
               "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None", f"--LabApp.app_settings_dir={settings}",
               f"--LabApp.workspaces_dir={folder / 'workspaces'}", f"--LabApp.user_settings_dir={folder / 'user'}",
               f"--ServerApp.root_dir={folder}"]
    address = f"http://127.0.0.1:{port}"
    with (folder / "server.log").open("w") as log, subprocess.Popen(
            command, env={**os.environ, **places, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log) as server:
        try:
            _wait_for(address + "/api/status", server, folder / "server.log")
            yield address
        finally:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(urllib.request.Request(address + "/api/shutdown", method="POST"), timeout=10)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        if server.poll() is not None:
            break
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=2):
            return
        time.sleep(0.25)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")
