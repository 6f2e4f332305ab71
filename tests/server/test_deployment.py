"""What stands beside the server names only what there is: metrics in the Grafana dashboard, options in the unit."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import httpx
import pytest
from server.support import MODEL
from typer.testing import CliRunner

from bros_ref.cli.common import app
from bros_ref.cli.live import COMMAND_MODULES
from bros_ref.server.settings import ServerSettings, read_api_keys

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "server"


def test_grafana_asks_for_metrics_that_exist(server, client):
    client.completions.create(model=MODEL, prompt="x", max_tokens=3)
    page = httpx.get(f"{server.url}/metrics").text
    exposed = set(re.findall(r"^(bros_\w+)", page, re.MULTILINE))
    expressions = [target["expr"] for panel in json.loads((DOCS / "grafana.json").read_text())["panels"]
                   for target in panel["targets"]]
    asked = {name for expression in expressions for name in re.findall(r"bros_\w+", expression)}
    assert len(asked) >= 12
    assert asked <= exposed, asked - exposed
    for state in ("empty", "rt_only", "be_only", "shared"):
        assert f'bros_kv_blocks{{state="{state}"}}' in page


@pytest.mark.parametrize(("name", "pattern"), [("bros-ref.service", r"ExecStart=((?:[^\\\n]|\\\n)*)"),
                                               ("Dockerfile", r"ENTRYPOINT (\[.*\])")])
def test_the_unit_and_the_image_start_what_exists(name, pattern):
    assert COMMAND_MODULES
    command = re.search(pattern, (DOCS / name).read_text())[1]
    words = json.loads(command) if name == "Dockerfile" else shlex.split(command.replace("\\\n", " "))
    assert words[0].endswith("bros-ref")
    assert words[1] == "serve"
    known = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[a-z-]+", known))


@pytest.mark.parametrize("given", [
    {"host": "0.0.0.0"}, {"host": "example.org"}, {"host": "::"}, {"port": 70000}, {"max_queued_rt": 0},
    {"api_keys": ("short",)}, {"api_keys": ("has a space in it, sadly",)},
])
def test_settings_that_are_refused(given):
    with pytest.raises(ValueError):
        ServerSettings(**given)


def test_settings_that_are_not():
    for host in ("127.0.0.1", "::1", "localhost"):
        ServerSettings(host=host)
    ServerSettings(host="0.0.0.0", api_keys=("0123456789abcdef",))


def test_key_files(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# mine\n\n first-key-0123456789 \nsecond-key-0123456789\n")
    assert read_api_keys(path) == ("first-key-0123456789", "second-key-0123456789")
    for content in (b"", b"# none\n", b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(ValueError):
            read_api_keys(path)


@pytest.mark.parametrize("arguments", [["--host", "0.0.0.0"], ["--policy", "nonsense"], ["--policy", "bros,tgi"],
                                       ["--api-key-file", "/nonexistent"], ["--ttft-slo-s", "-1"]])
def test_the_command_refuses_before_it_loads(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("bros_ref.engine.build.load_model", lambda *_: pytest.fail("it loaded"))
    result = CliRunner().invoke(app, ["serve", "--data-dir", str(tmp_path), *arguments])
    assert result.exit_code != 0
    assert isinstance(result.exception, ValueError | OSError | SystemExit)


def test_a_port_in_use_is_named(server, tmp_path):
    result = CliRunner().invoke(app, ["serve", "--data-dir", str(tmp_path), "--port", str(server.port)])
    assert "cannot listen" in str(result.exception)
