"""The layers of erq and erq_kernels: imports run downward only, without cycles.

One checker reads the imports of a tree from its syntax, wherever they stand: a late import upward
is still an import upward. What an import drags in at run time is asked in a fresh interpreter.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The parts of erq, from the top. A part is a module or a package directly under erq, "__init__" erq
# itself. A part imports itself and the rows below its own.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset(
        {
            *("__init__", "__main__", "cli", "options", "report", "demonstration", "loading"),
            *("page", "evaluation", "engines", "graphs", "timing", "inputs", "system", "pipeline"),
            *("record", "hub", "card", "export"),
        }
    ),
    frozenset({"deployment", "reduce"}),
    frozenset({"calib"}),
    frozenset({"models", "quant"}),
    frozenset({"config", "data", "progress", "_version"}),
    frozenset({"ranks", "messages"}),
)
ROW_OF = {part: row for row, parts in enumerate(LAYERS) for part in parts}

# In the top row a command may use its neighbours; further down, the parts of a row stand apart.
TOP_ROW = 0

# A deployed process loads erq.deployment without this module, and with it nothing of calibration.
CONVERTER = "erq.deployment.convert"

# Optional or heavy packages and the only place that imports each.
HOME_OF = {"triton": "erq_kernels._triton", "matplotlib": "erq.report"}


def module_name(path: str) -> str:
    """Dotted name of the module in a file, e.g. erq/quant/__init__.py → erq.quant."""
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The part of erq a module belongs to, e.g. erq.quant.params → quant."""
    return module.split(".")[1] if "." in module else "__init__"


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def read_imports(path: str, source: str, modules: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Yield (line, module) per import of a file; `modules` tells a submodule from a name."""
    package = module_name(path).split(".")
    if not path.endswith("/__init__.py"):
        package = package[:-1]
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                submodule = f"{origin}.{alias.name}"
                yield node.lineno, submodule if submodule in modules else origin


def why_forbidden(importer: str, imported: str) -> str | None:
    """The rule that an import breaks, or None."""
    top = imported.partition(".")[0]
    home = HOME_OF.get(top)
    if home is not None and not is_within(importer, home):
        return f"{top} is imported in {home} alone"
    if top != "erq":
        return None
    if is_within(importer, "erq_kernels"):
        return "erq_kernels knows nothing of erq"
    part, imported_part = part_of(importer), part_of(imported)
    if part == imported_part:
        return None
    row, imported_row = ROW_OF.get(part), ROW_OF.get(imported_part)
    if row is None or imported_row is None:
        return None  # reported once, as a part without a row
    if imported_row < row:
        return f"{part} stands below {imported_part}"
    if imported_row == row != TOP_ROW:
        return f"{part} and {imported_part} stand side by side"
    if part == "deployment" and imported_part == "calib" and importer != CONVERTER:
        return f"within deployment only {CONVERTER} sees calib"
    return None


def find_violations(sources: Mapping[str, str]) -> list[str]:
    """Check a tree against the layers.

    Args:
        sources: source text by path from the root, e.g. "erq/quant/params.py".
    Returns:
        One line per broken rule, empty for a tree in order.
    """
    modules = frozenset(map(module_name, sources))
    violations = []
    graph: dict[str, set[str]] = {}
    for path, source in sorted(sources.items()):
        importer = module_name(path)
        if is_within(importer, "erq") and part_of(importer) not in ROW_OF:
            violations.append(f"{path}: {part_of(importer)} has no row; give it one in LAYERS")
        for line, imported in read_imports(path, source, modules):
            reason = why_forbidden(importer, imported)
            if reason is not None:
                violations.append(f"{path}:{line}: imports {imported}, but {reason}")
            # erq/__init__.py is left out: it names the public surface and loads it on first use.
            if imported in modules and imported != importer and "erq" not in (importer, imported):
                graph.setdefault(importer, set()).add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        violations.append("import cycle: " + " ← ".join(error.args[1]))
    return violations


def read_tree() -> dict[str, str]:
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for package in ("erq", "erq_kernels")
        for path in (ROOT / package).rglob("*.py")
    }


def load_in_fresh_interpreter(*modules: str) -> frozenset[str]:
    """Import modules in a new process and return the names of all modules that it then holds."""
    program = f"import sys, {', '.join(modules)}\nprint('\\n'.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    loaded = frozenset(result.stdout.split())
    assert loaded.issuperset(modules)
    return loaded


def test_tree_keeps_the_layers() -> None:
    sources = read_tree()
    assert {"erq/__init__.py", "erq_kernels/__init__.py"} <= sources.keys()
    assert find_violations(sources) == []


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("erq/quant/params.py", "import erq.calib.observers", "quant stands below calib"),
        ("erq/quant/params.py", "from erq.reduce.ridge import solve", "quant stands below reduce"),
        ("erq/quant/fit.py", "from ..calib import observers", "quant stands below calib"),
        ("erq/quant/__init__.py", "from .. import reduce", "quant stands below reduce"),
        ("erq/models/sites.py", "from erq.calib import observers", "models stands below calib"),
        ("erq/models/sites.py", "from erq.quant import params", "stand side by side"),
        ("erq/calib/prepare.py", "def f():\n    import erq.reduce.ridge", "calib stands below"),
        ("erq/config.py", "from erq import pipeline", "config stands below pipeline"),
        ("erq/data.py", "import erq", "data stands below __init__"),
        ("erq/reduce/aqer.py", "from erq.deployment import modules", "stand side by side"),
        ("erq/deployment/modules.py", "from erq.reduce.ridge import solve", "stand side by side"),
        ("erq/deployment/convert.py", "from erq.reduce.ridge import solve", "stand side by side"),
        (
            "erq/deployment/modules.py",
            "from erq.calib import observers",
            "only erq.deployment.convert",
        ),
        ("erq/deployment/__init__.py", "import erq.calib.observers", "only erq.deployment.convert"),
        ("erq_kernels/ops.py", "from erq.quant import params", "knows nothing of erq"),
        ("erq_kernels/_triton/qlinear.py", "import erq", "knows nothing of erq"),
        ("erq_kernels/ops.py", "import triton.language as tl", "erq_kernels._triton alone"),
        ("erq/pipeline.py", "from matplotlib import pyplot", "erq.report alone"),
        ("erq/helpers.py", "import os", "helpers has no row"),
    ],
)
def test_forbidden_import_is_reported(path: str, source: str, reason: str) -> None:
    neighbours = ("erq/calib/observers.py", "erq/reduce/__init__.py", "erq/pipeline.py")
    [violation] = find_violations({**dict.fromkeys(neighbours, ""), path: source})
    assert violation.startswith(path)
    assert reason in violation


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("erq/__init__.py", "from erq.pipeline import quantize\nfrom erq import calib"),
        (
            "erq/cli.py",
            "import erq\nfrom erq import evaluation, report\nfrom erq.deployment import x",
        ),
        (
            "erq/deployment/convert.py",
            "from erq.calib.simulate import SimLinear\nimport erq_kernels",
        ),
        ("erq/deployment/modules.py", "from erq.models.sites import Site\nfrom .convert import x"),
        ("erq/reduce/wqer.py", "from . import ridge\nfrom erq.calib import simulate"),
        ("erq/calib/observers.py", "from ..quant import fit\nfrom erq.models import sites"),
        ("erq/quant/fit.py", "import math, torch\nfrom erq.quant.params import AffineParams"),
        ("erq/report.py", "def plot():\n    import matplotlib.pyplot"),
        ("erq_kernels/_triton/qlinear.py", "import triton\nfrom erq_kernels import formats"),
    ],
)
def test_import_downward_passes(path: str, source: str) -> None:
    assert find_violations({path: source}) == []


def test_cycle_is_reported() -> None:
    sources = {
        "erq/reduce/aqer.py": "from erq.reduce import rounding",
        "erq/reduce/rounding.py": "def f():\n    from .wqer import run",
        "erq/reduce/wqer.py": "import erq.reduce.aqer",
    }
    [violation] = find_violations(sources)
    assert violation.startswith("import cycle: ")
    assert all(module_name(path) in violation for path in sources)


def test_cycle_through_a_package_is_reported() -> None:
    sources = {
        "erq_kernels/__init__.py": "from erq_kernels.dispatch import call",
        "erq_kernels/dispatch.py": "from erq_kernels import explain",
    }
    [violation] = find_violations(sources)
    assert violation.startswith("import cycle: ")


@pytest.mark.parametrize("used", [False, True])
def test_import_erq_stays_light(used: bool) -> None:
    """Nor does a public name load, by being named, what only its use may need."""
    public = ["erq.deployment.checkpoint", "erq.pipeline", "erq.evaluation"] if used else []
    loaded = load_in_fresh_interpreter("erq", *public)
    heavy = {"timm", "torchvision", "triton", "matplotlib", "transformers", "sklearn", "onnx"}
    assert loaded.isdisjoint(heavy)
    if not used:
        assert "torch" not in loaded


def test_deployed_process_loads_nothing_of_calibration() -> None:
    deployed = sorted(
        module
        for module in map(module_name, read_tree())
        if is_within(module, "erq")
        and part_of(module) in {"deployment", "models", "quant"}
        and module != CONVERTER
    )
    assert {"erq.deployment.modules", "erq.models.sites", "erq.quant.params"} <= set(deployed)
    loaded = load_in_fresh_interpreter(*deployed)
    unwanted = ("erq.calib", "erq.reduce", CONVERTER)
    assert sorted(m for m in loaded if any(is_within(m, name) for name in unwanted)) == []
