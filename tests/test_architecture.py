"""Which module may import which: the rules of the design, checked in the source and in
`sys.modules`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE = ROOT / "engine"
FILES = sorted(path.relative_to(ENGINE).as_posix() for path in ENGINE.rglob("*.py"))
JOBS = sorted((ROOT / "jobs").glob("*.py"))
PLUGINS = ("readers", "embedders", "generators", "classifiers", "labelers", "filters", "captioners",
           "exporters")  # fmt: skip
HEAVY = ("torch", "diffusers", "transformers", "faiss", "ray")


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((ENGINE / file).read_text("utf-8"))


def below(file: str, *families: str) -> bool:
    return file.split("/")[0] in families


def imports(file: str, *, at_load: bool = False) -> Iterator[str]:
    """Full names of all imports of a file; `at_load`: only those that run when the file is
    imported."""

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}: imports are absolute"
                # `from engine.core import rows` imports engine.core.rows.
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            elif at_load and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            elif at_load and isinstance(child, ast.If) and _type_checking(child):
                continue
            else:
                yield from walk(child)

    yield from walk(tree(file))


def _type_checking(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def importers(package: str, *, at_load: bool = False) -> set[str]:
    return {
        file
        for file in FILES
        if any(within(name, package) for name in imports(file, at_load=at_load))
    }


def strangers(file: str, *allowed: str) -> set[str]:
    """Imports of the engine in a file other than `allowed`."""
    return {
        name
        for name in imports(file)
        if within(name, "engine") and not within(name, *(f"engine.{part}" for part in allowed))
    }


def test_import_scan_finds_known_imports() -> None:
    assert "engine.core.rows" in set(imports("steps/ingest.py"))
    assert "torch" in set(imports("embedders/_checkpoint.py"))
    assert "torch" not in set(imports("embedders/_checkpoint.py", at_load=True))
    assert len(FILES) > 30


# 1
def test_ray_and_mlflow_are_imported_only_in_their_files() -> None:
    names = ("cluster", "stream", "attendance", "fit", "search", "tune", "nested", "share",
             "monitor")  # fmt: skip
    assert importers("ray") <= {f"runtime/{name}.py" for name in names}
    assert importers("mlflow") <= {"tracking/mlflow.py"}


# 2
@pytest.mark.parametrize("file", [file for file in FILES if below(file, "core", "data", "work")])
def test_core_imports_only_itself_and_data_and_work_import_core(file: str) -> None:
    assert not strangers(file, "core", file.split("/")[0])
    assert not [name for name in imports(file, at_load=True) if within(name, *HEAVY)]


def test_registry_lists_no_plugin() -> None:
    names = {Path(file).stem for file in FILES if below(file, *PLUGINS)} - {"__init__"}
    texts = {node.value for node in ast.walk(tree("core/registry.py"))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)}  # fmt: skip
    assert not names & texts


@pytest.mark.parametrize(
    "file", [file for file in FILES if below(file, "nets", "metrics", "vectors")]
)
def test_nets_metrics_and_vectors_import_no_step_plugin_or_runtime(file: str) -> None:
    # A metric may give its result the form in which a step stores it.
    own = [file.split("/")[0], *(["results"] if below(file, "metrics") else [])]
    assert not strangers(file, "core", "data", "work", "vectors", *own)


# 3
@pytest.mark.parametrize("file", [file for file in FILES if below(file, "runtime")])
def test_runtime_imports_worker_code_and_no_step(file: str) -> None:
    assert not strangers(file, "core", "work", "runtime", "tuning.proposals")


@pytest.mark.parametrize("file", [file for file in FILES if below(file, "results")])
def test_results_import_only_core(file: str) -> None:
    assert not strangers(file, "core", "results")


@pytest.mark.parametrize(
    "file", [file for file in FILES if below(file, "report", "comparison", "stages")]
)
def test_report_comparison_and_stages_import_no_step(file: str) -> None:
    assert not [name for name in imports(file) if within(name, "engine.steps")]


# 4
@pytest.mark.parametrize("file", [file for file in FILES if below(file, "steps")])
def test_steps_import_no_concrete_plugin_and_no_runtime(file: str) -> None:
    for name in imports(file):
        assert not within(name, "engine.runtime", "engine.execute", "engine.cli", "engine.plan")
        family = name.split(".")[1] if within(name, "engine") and "." in name else ""
        if family in PLUGINS:
            # Only the Protocol of a family (`from engine.readers import Bytes`), never a plugin.
            assert not (ENGINE / family / f"{name.split('.')[2]}.py").exists(), name


def test_only_the_command_line_chooses_a_runtime() -> None:
    concrete = {"inline", "cluster", "stream", "attendance", "fit", "search", "tune", "nested",
                "share", "monitor", "scratch"}  # fmt: skip
    for file in FILES:
        if not below(file, "runtime") and file != "cli.py":
            runtimes = {name for name in imports(file) if within(name, "engine.runtime")}
            assert not {name for name in runtimes if name.split(".")[2] in concrete}, file


# 5
@pytest.mark.parametrize("file", [file for file in FILES if below(file, *PLUGINS)])
def test_plugins_import_no_step_runtime_or_other_family(file: str) -> None:
    rooms = ("core", "data", "work", "nets", "metrics", "vectors", "clients")
    assert not strangers(file, *rooms, file.split("/")[0])


# 6
@cache
def heavy_modules() -> set[str]:
    """The heavy libraries, and all modules whose import imports one, directly or indirectly.
    Runtimes are excluded, because Ray is their purpose."""
    loads = {
        f"engine.{file[:-3].replace('/', '.')}".removesuffix(".__init__"): set(
            imports(file, at_load=True)
        )
        for file in FILES
        if not below(file, "runtime")
    }
    heavy: set[str] = set()
    more = set(HEAVY)
    while more:
        heavy |= more
        more = {module for module, names in loads.items()
                if any(within(name, *heavy) for name in names)} - heavy  # fmt: skip
    return heavy


def test_only_networks_and_private_modules_import_heavy_libraries() -> None:
    # Networks are subclasses of torch's classes; their users import them inside functions.
    modules = heavy_modules() - set(HEAVY)
    assert "engine.nets.dcgan" in modules
    assert not [
        module
        for module in modules
        if not within(module, "engine.nets") and not module.rpartition(".")[2].startswith("_")
    ]


def loaded_by(code: str) -> set[str]:
    """Top-level modules in `sys.modules` of a new process after `code`."""
    tail = "\nimport sys as _s; print('\\nLOADED', *{n.split('.')[0] for n in _s.modules})"
    ran = subprocess.run(
        [sys.executable, "-c", code + tail], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.rsplit("LOADED", 1)[1].split())


HELP = """
import runpy, sys
sys.argv = ["jobs/run_study.py", "--help"]
from engine import cli
try:
    cli.run_study(["--help"])
except SystemExit as stopped:
    assert stopped.code == 0
"""
PLAN = """
from pathlib import Path
from engine.plan import plan
from engine.study import load_study
assert plan(load_study(Path("configs/digits.yaml")))
"""


@pytest.mark.parametrize(
    "code",
    ["import engine.study", "import engine.plan", HELP, PLAN],
    ids=["study", "plan", "help", "a plan of digits"],
)
def test_reading_and_planning_a_study_imports_nothing_heavy(code: str) -> None:
    assert not loaded_by(code) & set(HEAVY)


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.name)
def test_help_of_a_job_imports_nothing_heavy(job: Path) -> None:
    # The script ends by os._exit, so each import is printed as it happens.
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", str(job), "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "usage:" in ran.stdout
    loaded = {line.rsplit("|", 1)[-1].strip() for line in ran.stderr.splitlines() if "|" in line}
    assert "engine.cli" in loaded
    assert not {name for name in loaded if within(name, *HEAVY)}


# 7
def test_environment_is_read_only_in_its_files() -> None:
    # data/sandbox.py reads no setting from it: it passes it on to its child, which must find
    # the same Python, libraries and locale as its parent.
    allowed = {"runtime/cluster.py", "cli.py", "tracking/mlflow.py", "core/secrets.py",
               "data/sandbox.py"}  # fmt: skip
    for file in set(FILES) - allowed:
        for node in ast.walk(tree(file)):
            name = node.attr if isinstance(node, ast.Attribute) else ""
            name = node.name if isinstance(node, ast.alias) else name
            assert name not in ("environ", "getenv", "putenv", "environb"), file


def test_storage_is_opened_in_two_files() -> None:
    # core/store.py owns the paths of storage, data/source.py those of the user's data.
    assert importers("fsspec") <= {"core/store.py", "data/source.py"}
    assert importers("s3fs") == importers("boto3") == set()


def test_storage_keys_are_made_only_in_the_store() -> None:
    layout = ("steps/", "generated/", "work/", "pages/", "commits/", "parts/", "claims/")
    for file in set(FILES) - {"core/store.py", "core/shards.py"}:
        documents = {
            id(node.body[0].value)
            for node in ast.walk(tree(file))
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said = id(node) in documents
                assert said or not node.value.startswith(layout), f"{file}: {node.value!r}"


def test_paths_are_joined_only_in_two_files() -> None:
    for file in set(FILES) - {"core/store.py", "data/source.py"}:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("os.path.join", "posixpath.join"), file


def test_jobs_are_short_and_shadow_no_standard_module() -> None:
    assert JOBS
    for job in JOBS:
        # Built-in modules are found before any file.
        assert job.stem not in sys.stdlib_module_names - set(sys.builtin_module_names)
        assert len(job.read_text("utf-8").splitlines()) <= 60


def test_imports_of_benchmarks_exist() -> None:
    import importlib

    missing = []
    for path in sorted(Path("benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("engine"):
                module = importlib.import_module(str(node.module))
                missing += [
                    f"{path}: {node.module}.{alias.name}"
                    for alias in node.names
                    if not hasattr(module, alias.name)
                ]
    assert not missing


def test_there_are_no_import_cycles() -> None:
    modules = {"engine" if file == "__init__.py" else
               f"engine.{file[:-3].removesuffix('/__init__').replace('/', '.')}": file
               for file in FILES}  # fmt: skip
    needs = {
        module: {name if name in modules else name.rpartition(".")[0] for name in imports(file)}
        & modules.keys() - {module}
        for module, file in modules.items()
    }
    # Repeatedly remove modules that import none of the rest; what remains are cycles.
    while free := [module for module, needed in needs.items() if not needed & needs.keys()]:
        for module in free:
            del needs[module]
    assert not needs
