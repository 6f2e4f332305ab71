"""pyproject.toml is the only list of requirements: the lock, the conda file and what is installed agree with it."""

import os
import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(line) for lines in (PROJECT["dependencies"], *EXTRAS.values()) for line in lines]
INSTALLED_HERE = [Requirement(line) for line in (*PROJECT["dependencies"], *EXTRAS["dev"])]
PINS = {canonicalize_name(match[1]): match[2] for match in re.finditer(
    r"^([A-Za-z0-9._-]+)==([^ ;\n]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_requirement_is_pinned_within_its_bounds(requirement):
    pin = PINS.get(canonicalize_name(requirement.name))
    assert pin is not None, f"requirements.lock has no {requirement.name}; run `make lock`"
    assert requirement.specifier.contains(pin, prereleases=True), f"{requirement} is locked at {pin}; run `make lock`"


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_requirement_has_an_upper_bound(requirement):
    assert any(part.operator in ("<", "==") for part in requirement.specifier)


@pytest.mark.parametrize("requirement", INSTALLED_HERE, ids=str)
def test_what_is_installed_satisfies_the_project(requirement):
    assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)


def test_the_conda_file_defers_to_the_project():
    packages = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert [package for package in packages if isinstance(package, str)] == ["python=3.11", "pip"]
    [pip] = [package["pip"] for package in packages if isinstance(package, dict)]
    assert pip[0] == "-c requirements.lock"
    [extras] = re.findall(r"-e \.\[(.*)\]", pip[1])
    assert set(extras.split(",")) <= set(EXTRAS)
    assert len(pip) == 2


def test_tracked_files_name_no_place_on_this_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    configured = subprocess.run(["pip", "config", "list"], capture_output=True, text=True, check=False).stdout
    hosts = set(re.findall(r"https?://(?:[^@/\s']*@)?([^/\s']+)", configured))
    places = {str(ROOT), str(ROOT.parent) + os.sep, *hosts} - {os.sep}
    hits = {place: subprocess.run(["git", "grep", "-lF", place], cwd=ROOT, capture_output=True, text=True,
                                  check=False).stdout.split() for place in places}
    assert {place: files for place, files in hits.items() if files} == {}
