"""The command `iommulab`: each sub-command is a module with `add_parser(subparsers)`, which sets `run`."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

from iommulab.arguments import Parser
from iommulab.errors import UserError
from iommulab.session import Stopped, signals_unwind

#: Each command's module, in the order of the help.
COMMANDS = {
    "conformance": "suite",
    "run": "run",
    "selftest": "kselftest",
    "compare": "compare",
    "fuzz": "fuzz.cli",
    "kernel": "kernel_build",
    "uapi": "uapi_cli",
    "versions": "versions",
    "bench": "bench",
    "coverage": "coverage",
    "doctor": "doctor",
}


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The command line; with only one command's module loaded where that is known to be the one."""
    top = Parser(
        prog="iommulab",
        description="A Linux kernel-ABI compatibility shim and test harness for iommufd and VFIO.",
    )
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in [COMMANDS[command]] if command in COMMANDS else COMMANDS.values():
        import_module(f"iommulab.{module}").add_parser(commands)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command: 0, 1 where it found something wrong, 2 where it could not do what was asked.

    128 and the signal's number where Ctrl-C, SIGTERM or SIGHUP ended it.
    """
    given = sys.argv[1:] if arguments is None else arguments
    args = parser(given[0] if given else None).parse_args(given)
    try:
        with signals_unwind():
            status: int = args.run(args)
            return status
    except UserError as error:
        print(f"iommulab: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader (head, less) has gone; nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Stopped as stopped:
        print(f"iommulab: stopped by {stopped}", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print("iommulab: interrupted", file=sys.stderr)
        return 130
