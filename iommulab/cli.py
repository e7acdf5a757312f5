"""The command `iommulab`: one sub-command a module, each with `add_parser(subparsers)` that sets `run`."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from importlib.util import find_spec

from iommulab.errors import UserError

#: In the order of the help. A module that is not there yet is left out.
COMMANDS = ("suite", "compare", "kernel_build", "uapi_cli", "bench", "coverage", "doctor")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="iommulab",
        description="A Linux kernel-ABI compatibility shim and test harness for iommufd and VFIO.",
    )
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        if find_spec(f"iommulab.{name}") is not None:
            import_module(f"iommulab.{name}").add_parser(commands)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command: 0, 1 where it found something wrong, 2 where it could not do what was asked."""
    args = parser().parse_args(arguments)
    try:
        status: int = args.run(args)
        return status
    except UserError as error:
        print(f"iommulab: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader (head, less) has gone; nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("iommulab: interrupted", file=sys.stderr)
        return 130
