"""README and docs/: links lead somewhere, what they name exists, and the README's example runs as it is printed."""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from iommulab import versions
from iommulab.cli import parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
#: A word after `iommulab` in a command: a sub-command, and after some of them one more.
COMMAND = re.compile(r"(?:^|[\s`/])iommulab ((?:[a-z]+)(?: [a-z]+)?)(?=[\s`]|$)", re.M)
#: `kernel_model/door.py:ModelFile.ioctl`, with the name or without.
PLACE = re.compile(
    r"`((?:uapi|fakedev|kernel_model|shim|conformance|iommulab|tests|benchmarks)/[\w/]+\.py)(?::([\w.]+))?`"
)


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))


def sub_commands(of: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def code(text: str) -> Iterator[str]:
    """What is printed as code: blocks, and words between backticks."""
    yield from re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    yield from (f"`{word}`" for word in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)))


@pytest.mark.parametrize("page", TEXTS)
def test_relative_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if not re.match(r"[a-z]+:", link):
            path, _, anchor = link.partition("#")
            assert (ROOT / page).parent.joinpath(path or page).exists(), f"{page}: {link}"
            assert not anchor, f"{page}: {link}: anchors are not checked, link to the page"


def test_versions_page_has_the_table_as_the_command_prints_it() -> None:
    assert versions.markdown() in TEXTS["docs/versions.md"], "print it anew: iommulab versions --markdown"


@pytest.mark.parametrize("page", TEXTS)
def test_commands_exist(page: str) -> None:
    commands = sub_commands(parser())
    known = targets()
    for piece in code(TEXTS[page]):
        for target in re.findall(r"(?:^|[\s`])make ([a-z]+)(?=[\s`]|$)", piece, re.M):
            assert target in known, f"{page}: make {target}"
        for words in COMMAND.findall(piece):
            first, _, second = words.partition(" ")
            if first == "uapi" and second in ("and", "is", "has"):
                continue
            assert first in commands, f"{page}: iommulab {words}"
            below = sub_commands(commands[first])
            if below and second:
                assert second in below, f"{page}: iommulab {words}"


@pytest.mark.parametrize("page", TEXTS)
def test_options_of_commands_exist(page: str) -> None:
    commands = sub_commands(parser())
    for piece in code(TEXTS[page]):
        for first, rest in re.findall(r"(?:^|[\s`/])iommulab ([a-z]+)([^\n`#|]*)", piece):
            tree = [commands[first], *sub_commands(commands[first]).values()]
            known = {option for one in tree for action in one._actions for option in action.option_strings}
            for option in re.findall(r"(?<=\s)(--[a-z-]+|-[a-z])(?=[\s=]|$)", rest):
                assert option in known, f"{page}: iommulab {first}{rest}"


@pytest.mark.parametrize("page", TEXTS)
def test_places_in_the_code_exist(page: str) -> None:
    for path, name in PLACE.findall(TEXTS[page]):
        assert (ROOT / path).is_file(), f"{page}: {path}"
        if name:
            body = ast.parse((ROOT / path).read_text()).body
            for part in name.split("."):
                found = [n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part]
                assert found, f"{page}: {path}:{name}"
                body = found[0].body


@pytest.mark.parametrize("page", TEXTS)
def test_lines_are_at_most_120_wide(page: str) -> None:
    """But for tables, which Markdown cannot break, and what a command printed."""
    fenced = False
    for number, line in enumerate(TEXTS[page].splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        assert fenced or line.startswith("|") or len(line) <= 120, f"{page}:{number}"


#: Whole files: they begin with an import and have a test.
EXAMPLES = [
    pytest.param(block, id=f"{page}-{number}")
    for page, text in TEXTS.items()
    for number, block in enumerate(re.findall(r"^```python\n((?:from|import) .*?)^```", text, re.M | re.S))
    if re.search(r"^def test_", block, re.M)
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run(tmp_path: Path, example: str) -> None:
    """In a folder of their own, with the plugin alone."""
    (tmp_path / "test_example.py").write_text(example)
    # Named, not found by its entry point: then it does not matter whether the project is installed here.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "iommulab.pytest_plugin", "."]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_readme_tests_a_driver_in_15_lines() -> None:
    found = re.search(r"15 lines.*?^```python\n(.*?)^```", TEXTS["README.md"], re.M | re.S)
    assert found
    assert "def test_" in found[1]
    assert len([line for line in found[1].splitlines() if line.strip()]) <= 15
