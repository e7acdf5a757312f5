"""Who may import whom (docs: the rooms), held over the syntax trees of all our packages."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("uapi", "fakedev", "kernel_model", "shim", "conformance", "iommulab")
#: What a package may import of ours besides itself.
MAY = {
    "uapi": set[str](),
    "fakedev": {"uapi.pci_regs"},
    "kernel_model": {"uapi", "fakedev"},
    "shim": {"uapi", "kernel_model"},
    "conformance": {"uapi"},
    "iommulab": {"uapi", "fakedev", "kernel_model", "shim", "conformance"},
}
#: Nothing but these from outside: `uapi` and `conformance` run inside bare guests.
BARE = {"uapi": {"ioctl_opt"}, "conformance": {"ioctl_opt", "pytest"}}
#: Outside packages that only some modules may need: they read headers on a developer's machine.
BARE_EXCEPT = {"uapi.headers": {"elftools"}}
#: Modules that may import inside a function: they load what is asked for and nothing else.
LAZY = {"iommulab.connect", "iommulab.cli"}
#: A driver knows a vendor's registers and entries, never the unit that reads them.
UNITS = {"fakedev.vtd.unit", "fakedev.smmuv3.unit"}


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in MODULES.items()}


def type_checking_only(tree: ast.Module) -> set[ast.stmt]:
    """Statements under `if TYPE_CHECKING:`, which never run."""
    found: set[ast.stmt] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            found.update(inner for inner in ast.walk(ast.Module(node.body, [])) if isinstance(inner, ast.stmt))
    return found


def targets(name: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The modules that an import statement loads, those of ours as deep as they are modules."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        parts = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
        parts = parts[: len(parts) - node.level + 1]
        base = ".".join([*parts, base] if base else parts)
    for alias in node.names:
        yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


def imports(name: str, *, running: bool = True) -> list[tuple[str, ast.stmt]]:
    """What a module imports; without the imports that only the type checker sees, if `running`."""
    skipped = type_checking_only(TREES[name]) if running else set()
    return [
        (target, node)
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in skipped
        for target in targets(name, node)
    ]


def package_of(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_what_its_package_may(name: str) -> None:
    package = package_of(name)
    wrong = []
    for target, node in imports(name, running=False):
        if package_of(target) not in PACKAGES or package_of(target) == package:
            continue
        if target not in MAY[package] and package_of(target) not in MAY[package]:
            wrong.append(f"line {node.lineno}: {target}")
    assert not wrong


@pytest.mark.parametrize("name", [name for name in MODULES if package_of(name) in BARE])
def test_bare_packages_need_nothing_but_the_standard_library(name: str) -> None:
    allowed = sys.stdlib_module_names | set(PACKAGES) | BARE[package_of(name)] | BARE_EXCEPT.get(name, set())
    assert [target for target, _ in imports(name) if package_of(target) not in allowed] == []


def test_no_package_imports_the_commands() -> None:
    users = [name for name in MODULES if package_of(name) != "iommulab"]
    assert [name for name in users if any(package_of(target) == "iommulab" for target, _ in imports(name))] == []


def test_kernel_model_never_sees_an_iommu_unit() -> None:
    users = [name for name in MODULES if package_of(name) == "kernel_model"]
    assert [name for name in users if any(target in UNITS for target, _ in imports(name, running=False))] == []


@pytest.mark.parametrize("name", MODULES)
def test_no_star_import(name: str) -> None:
    stars = [
        node.lineno
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]
    assert stars == []


@pytest.mark.parametrize("name", [name for name in MODULES if name not in LAZY])
def test_no_import_inside_a_function(name: str) -> None:
    inside = [
        node.lineno
        for function in ast.walk(TREES[name])
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert inside == []


def test_no_cycle() -> None:
    graph = {name: {target for target, _ in imports(name) if target in MODULES} - {name} for name in MODULES}
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> None:
        if name in done:
            return
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        path.append(name)
        for target in sorted(graph[name]):
            visit(target)
        path.pop()
        done.add(name)

    for name in MODULES:
        visit(name)
