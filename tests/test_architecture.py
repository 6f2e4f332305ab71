"""The house rules, read from the source: who may import whom, sizes, docstrings, no clock inside a policy."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bros_ref"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70  # docstring and comments included


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def imports(source, *, top_level_only=True):
    """Modules that a source imports when it is imported (or anywhere in it), TYPE_CHECKING blocks left out."""
    found = set()

    def visit(nodes):
        for node in nodes:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module)
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
            elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)) and not (
                    isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and top_level_only):
                visit(ast.iter_child_nodes(node))

    visit(ast.parse(source).body)
    return found


def reachable(module, sources):
    """Everything that importing a module imports, through our own modules."""
    seen, queue = set(), [module]
    while queue:
        for found in imports(sources[queue.pop()]):
            if found not in seen:
                seen.add(found)
                if found in sources:
                    queue.append(found)
    return seen


def imports_torch(module, sources):
    return any(found.split(".")[0] == "torch" for found in reachable(module, sources))


DECIDE_AND_ACCOUNT = [name for name in SOURCES if name.startswith(("bros_ref.scheduler", "bros_ref.kv_cache"))
                      and name != "bros_ref.kv_cache.storage"]
WITHOUT_TORCH = [*DECIDE_AND_ACCOUNT, *(f"bros_ref.{name}" for name in (
    "config", "request", "clock", "files", "trace", "trace.metrics", "workload", "workload.files", "workload.paper",
    "engine", "engine.serve", "engine.assemble", "engine.detokenizer", "engine.progress", "simulator.cost_model",
    "simulator.runner", "simulator.simulate", "simulator.simulation",
    "evaluation.optimality", "evaluation.reproduce", "cli.simulation"))]
FOUNDATION = ("config", "clock", "request", "files", "kv_cache.blocks")


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_deciding_and_accounting_never_import_torch(module):
    assert not imports_torch(module, SOURCES)


def test_the_torch_rule_sees_an_import_through_another_module():
    sources = {"a": "import b", "b": "from torch import nn"}
    assert imports_torch("a", sources)
    assert not imports_torch("a", {"a": "def f():\n    import torch"})


@pytest.mark.parametrize("module", FOUNDATION)
def test_the_vocabulary_needs_the_standard_library_only(module):
    import sys

    outside = {found for found in imports(SOURCES[f"bros_ref.{module}"], top_level_only=False)
               if found.split(".")[0] not in sys.stdlib_module_names}
    assert not outside


FORBIDDEN = {  # room -> the rooms that it must not name, anywhere
    "bros_ref.kv_cache": ("bros_ref.scheduler", "bros_ref.model", "bros_ref.engine", "bros_ref.trace"),
    "bros_ref.scheduler": ("bros_ref.model", "bros_ref.engine", "bros_ref.trace", "bros_ref.kv_cache.storage"),
    "bros_ref.model": ("bros_ref.request", "bros_ref.scheduler", "bros_ref.engine", "bros_ref.trace"),
    "bros_ref.trace": ("bros_ref.engine", "bros_ref.model", "bros_ref.workload", "bros_ref.simulator"),
    "bros_ref.workload": ("bros_ref.scheduler", "bros_ref.kv_cache", "bros_ref.engine", "bros_ref.model"),
    "bros_ref.engine": ("bros_ref.simulator",),
    "bros_ref.viz": ("bros_ref.engine", "bros_ref.scheduler", "bros_ref.kv_cache", "bros_ref.model", "torch"),
    "bros_ref.viz.figures": ("bros_ref.viz.widgets",),
    "bros_ref": ("notebooks", "tests"),
}
TOP = ("cli", "evaluation", "server", "integrations")  # rooms that nothing below them names


def broken_edges(sources):
    return [(module, found) for place, forbidden in FORBIDDEN.items() for module, source in sources.items()
            if (module + ".").startswith(place + ".")
            for found in imports(source, top_level_only=False) if found.startswith(forbidden)]


def test_no_forbidden_edge():
    assert broken_edges(SOURCES) == []
    assert broken_edges({"bros_ref.viz.x": "from bros_ref.engine import LLMEngine"})


def uses_of_top(sources):
    """(module, found): a module of a lower room that names one of the top rooms."""
    return [(module, found) for module, source in sources.items()
            for found in imports(source, top_level_only=False) for room in TOP
            if (found + ".").startswith(f"bros_ref.{room}.") and module.split(".")[1:2] not in [[top] for top in TOP]
            and module != "bros_ref.__main__"]


def test_nothing_below_them_names_the_top_rooms():
    assert uses_of_top(SOURCES) == []
    assert uses_of_top({"bros_ref.engine.x": "def f():\n    from bros_ref.cli.live import main"})


def test_no_import_circle():
    """In the order of imports at the top of modules, each module comes after all that it imports."""
    assert circle(SOURCES) is None
    assert circle({"a": "import b", "b": "import a"}) is not None


def circle(sources):
    graph = {module: {found for found in imports(source) if found in sources and found != module}
             for module, source in sources.items()}
    while graph:
        free = [module for module, needs in graph.items() if not needs & graph.keys()]
        if not free:
            return sorted(graph)
        for module in free:
            del graph[module]
    return None


CORE = ("scheduler", "kv_cache", "model", "engine", "request", "config", "trace")
BESIDE_THE_CORE = (  # read one at a time, each on its own
    "bros_ref.scheduler.baselines", "bros_ref.trace.replay", "bros_ref.trace.perfetto", "bros_ref.trace.metrics",
    # readers of other people's files: mostly tables of the keys that are understood
    "bros_ref.model.weights", "bros_ref.model.tokenizer", "bros_ref.model.chat_template",
    "bros_ref.model.special_tokens", "bros_ref.model.control_tokens",
    "bros_ref.engine.ranks")  # the processes of a split model
MAX_CORE_LINES = 5_500


def test_the_core_stays_readable():
    lines = {module: len(source.splitlines()) for module, source in SOURCES.items()
             if module.split(".")[1:2] and module.split(".")[1] in CORE and not module.startswith(BESIDE_THE_CORE)}
    assert lines
    assert sum(lines.values()) <= MAX_CORE_LINES, sum(lines.values())


def test_only_the_benchmark_names_transformers():
    users = [module for module, source in SOURCES.items() if "transformers" in imports(source, top_level_only=False)]
    assert users == ["bros_ref.evaluation.bench.reference"]


KERNEL_SOURCES = {module_name(path): path.read_text() for path in sorted((ROOT / "kernels_cupy").rglob("*.py"))}


def test_kernels_know_nothing_of_the_package():
    import sys

    allowed = {"kernels_cupy", "numpy", "torch", "cupy", *sys.stdlib_module_names}
    found = {(module, name) for module, source in KERNEL_SOURCES.items()
             for name in imports(source, top_level_only=False) if name.split(".")[0] not in allowed}
    assert found == set()
    assert len(KERNEL_SOURCES) > 5


def test_what_runs_kernels_does_not_need_what_proves_them():
    users = [module for module, source in KERNEL_SOURCES.items() if not module.startswith("kernels_cupy.proof")
             and any(found.startswith("kernels_cupy.proof") for found in imports(source, top_level_only=False))]
    assert users == []


def test_only_the_backends_name_the_kernels():
    users = {module for module, source in SOURCES.items()
             if any(found.startswith("kernels_cupy") for found in imports(source, top_level_only=False))}
    assert users <= {"bros_ref.model.backends", "bros_ref.cli.kernels", "bros_ref.evaluation.bench.kernels",
                     "bros_ref.evaluation.bench.peers", "bros_ref.evaluation.bench.gpu_step", "bros_ref.gpu.attention",
                     "bros_ref.gpu.copies", "bros_ref.gpu.decoder"}
    assert users


def test_only_who_builds_a_model_knows_the_room_of_the_gpu():
    """Everything on a CPU works without it, and it is imported only when a kernel backend is asked for."""
    users = {module for module, source in SOURCES.items() if not module.startswith("bros_ref.gpu")
             and any(found.startswith("bros_ref.gpu") for found in imports(source, top_level_only=False))}
    assert users == {"bros_ref.engine.build", "bros_ref.model.backends", "bros_ref.evaluation.bench.gpu_step"}
    assert not any(found.startswith("bros_ref.gpu") for module in ("bros_ref.engine.build", "bros_ref.model.backends")
                   for found in imports(SOURCES[module]))


def clock_reads(source):
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [ast.unparse(call) for call in calls if ast.unparse(call).split(".")[0] in ("time", "datetime")]


def test_no_policy_and_no_account_reads_the_clock():
    assert {module: clock_reads(SOURCES[module]) for module in DECIDE_AND_ACCOUNT if clock_reads(SOURCES[module])} == {}
    assert clock_reads("import time\ndef f():\n    return time.monotonic()")


def oversized(sources):
    too_long = [f"{module}: {lines} lines" for module, source in sources.items()
                if (lines := len(source.splitlines())) > MAX_FILE_LINES]
    for module, source in sources.items():
        too_long += [f"{module}.{node.name}: {node.end_lineno - node.lineno + 1} lines"
                     for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)
                     and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES]
    return too_long


def test_files_and_functions_stay_short():
    assert oversized({"x": "pass\n" * 401}) == ["x: 401 lines"]
    assert len(oversized({"x": "def f():\n" + "    pass\n" * 80})) == 1
    allowed = {"bros_ref.scheduler.base.schedule"}  # the admission loop: one loop, read top to bottom
    assert [entry for entry in oversized(SOURCES | KERNEL_SOURCES) if entry.split(":")[0] not in allowed] == []


def undocumented(module, source):
    tree = ast.parse(source)
    missing = [] if ast.get_docstring(tree) or not tree.body else [module]
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            missing.append(f"{module}.{node.name}")
        if isinstance(node, ast.ClassDef) and not node.bases:  # an override is documented where it is declared
            missing += [f"{module}.{node.name}.{member.name}" for member in node.body
                        if isinstance(member, ast.FunctionDef) and not member.name.startswith("_")
                        and not ast.get_docstring(member) and len(member.body) > 8]
    return missing


def test_everything_public_is_documented():
    assert undocumented("m", "def f(): ...") == ["m", "m.f"]
    assert [name for module, source in (SOURCES | KERNEL_SOURCES).items()
            for name in undocumented(module, source)] == []
