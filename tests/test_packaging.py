"""pyproject.toml is the only list of requirements: the lock, the conda file, what is installed and what is imported
agree with it; and the wheel that is built from it works in an environment of its own."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

LINES = {line for lines in (PROJECT["dependencies"], *EXTRAS.values()) for line in lines}
REQUIREMENTS = [requirement for requirement in map(Requirement, sorted(LINES)) if requirement.name != PROJECT["name"]]
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


# -- what is imported is declared -------------------------------------------------------------------------------------

ROOMS = {  # what may be imported beside the requirements that everybody gets: the extras of the longest prefix
    "bros_ref": [],
    "bros_ref.viz": ["viz"],
    "bros_ref.viz.widgets": ["notebooks"],
    "bros_ref.viz.notebook": ["notebooks"],
    "bros_ref.server": ["server"],
    "bros_ref.cli.serve": ["server"],
    "bros_ref.evaluation.bench": ["dev", "gpu", "server"],  # peers are measured where they are installed
    "bros_ref.integrations": ["dev"],
    "kernels_cupy": ["gpu"],
}
NOT_ON_THE_INDEX = {  # measured or integrated with where somebody installed them; never required
    "vllm", "xllamacpp", "flashinfer", "flash_attn", "torchao", "ray", "mpi4py"}


def declared(extras):
    """Import names of the base requirements and those of some extras, of the extras that these name too."""
    names, wanted = set(), list(PROJECT["dependencies"])
    for extra in extras:
        wanted += EXTRAS[extra]
    for requirement in map(Requirement, wanted):
        if requirement.name == PROJECT["name"]:
            names |= declared(requirement.extras)
        name = canonicalize_name(requirement.name)
        names |= {"cupy"} if name.startswith("cupy") else {name.replace("-", "_")}
    return names


class Imports(ast.NodeVisitor):
    """Top-level names of all imports that run, wherever they stand; what only type checkers see is left out."""

    def __init__(self, source):
        self.found = set()
        self.visit(ast.parse(source))

    def visit_If(self, node):
        if "TYPE_CHECKING" not in ast.dump(node.test):
            self.generic_visit(node)

    def visit_Import(self, node):
        self.found |= {alias.name.split(".")[0] for alias in node.names}

    def visit_ImportFrom(self, node):
        if node.module and node.level == 0:
            self.found.add(node.module.split(".")[0])


def third_party(source):
    return Imports(source).found - sys.stdlib_module_names - {"bros_ref", "kernels_cupy"}


def test_every_import_is_declared_for_its_room():
    undeclared = {}
    for path in [*ROOT.glob("bros_ref/**/*.py"), *ROOT.glob("kernels_cupy/**/*.py")]:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        room = max((room for room in ROOMS if (module + ".").startswith(room + ".")), key=len)
        lacking = third_party(path.read_text()) - declared(ROOMS[room]) - NOT_ON_THE_INDEX
        if lacking:
            undeclared[module] = sorted(lacking)
    assert undeclared == {}


def test_a_command_without_its_extra_says_what_to_install(tmp_path):
    """In an environment without plotly: one line and status 2; what needs no chart works."""
    script = "import sys; sys.modules['plotly'] = None; from bros_ref.cli.live import main; main()"
    lacking = subprocess.run([sys.executable, "-c", script, "demo", "--out", str(tmp_path)], capture_output=True,
                             text=True, check=False)
    assert (lacking.returncode, lacking.stdout) == (2, "")
    assert lacking.stderr == "bros-ref: plotly is missing; pip install 'bros-ref[viz]' brings it\n"
    simulate = subprocess.run(
        [sys.executable, "-c", script, "simulate", "--workload", "paper", "--gpu", "a100-40gb", "--model", "opt-13b",
         "--tp", "2", "--policies", "bros", "--rt-rate", "1", "--duration-s", "2"], capture_output=True, text=True,
        check=False)
    assert simulate.returncode == 0, simulate.stderr


# -- the wheel --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built offline from a copy of what goes into it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("bros_ref", "kernels_cupy"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation",
                    "--wheel-dir", out, source], check=True, capture_output=True, text=True)
    [built] = out.glob("*.whl")
    return built


def test_the_wheel_holds_everything_but_caches(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(path.relative_to(ROOT)) for name in ("bros_ref", "kernels_cupy")
                for path in (ROOT / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert expected - held == set()
    assert {"bros_ref/py.typed", "kernels_cupy/py.typed"} <= expected
    assert {name for name in held - expected if ".dist-info/" not in name} == set()
    assert any(name.endswith("licenses/LICENSE") for name in held)


def test_the_wheel_works_in_an_environment_of_its_own(wheel, tmp_path):
    """Its requirements are borrowed from the environment of this test by a path; the checkout is not on it."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps",
                    wheel], check=True, capture_output=True, text=True)
    [site] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def ask(*command):
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout

    places = ask(python, "-c", "import bros_ref, kernels_cupy; print(bros_ref.__file__, kernels_cupy.__file__)")
    assert all(Path(place).is_relative_to(site) for place in places.split())
    assert ask(python, "-c", "from importlib.metadata import version as v; import bros_ref; "
               "print(v('bros-ref') == bros_ref.__version__)") == "True\n"
    script = tmp_path / "venv" / "bin" / "bros-ref"
    simulated = ask(script, "simulate", "--workload", "paper", "--gpu", "a100-40gb", "--model", "opt-13b", "--tp", "2",
                    "--policies", "bros", "--rt-rate", "1", "--duration-s", "2", "--report", "report.html",
                    "--json", "-")
    assert '"policy": "bros"' in simulated
    assert "Plotly.newPlot" in (tmp_path / "report.html").read_text()


# -- the checkout -----------------------------------------------------------------------------------------------------


def test_tracked_files_name_no_place_on_this_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    configured = subprocess.run(["pip", "config", "list"], capture_output=True, text=True, check=False).stdout
    hosts = set(re.findall(r"https?://(?:[^@/\s']*@)?([^/\s']+)", configured))
    places = {str(ROOT), str(ROOT.parent) + os.sep, *hosts} - {os.sep}
    hits = {place: subprocess.run(["git", "grep", "-lF", place], cwd=ROOT, capture_output=True, text=True,
                                  check=False).stdout.split() for place in places}
    assert {place: files for place, files in hits.items() if files} == {}
