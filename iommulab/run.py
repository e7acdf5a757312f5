"""`iommulab run`: an unmodified program on the model, by seccomp user notification."""

from __future__ import annotations

import argparse

from conformance.drivers.vfio import take
from iommulab.arguments import add_model_options
from iommulab.errors import UserError
from kernel_model.errors import KernelError
from kernel_model.kernel import Kernel
from shim.launch import CannotRun, run_program
from uapi.version import NEWEST


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("run", help="run a program, unmodified, on the model", description=__doc__)
    parser.add_argument(
        "--machine", default="q35-vtd-legacy", metavar="NAME", help="the hardware, or a file .toml: %(default)s"
    )
    parser.add_argument("--version", default=NEWEST, metavar="V", help="the release of the kernel: %(default)s")
    parser.add_argument(
        "--bind",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="give a PCI function (0000:00:10.0) to vfio-pci first; may be repeated",
    )
    add_model_options(parser)
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="-- PROGRAM ARGS", help="what to run")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The program's exit status; 128 and the signal's number where a signal killed it, as a shell says it."""
    program = args.program[1:] if args.program[:1] == ["--"] else args.program
    if not program:
        raise UserError("name a program: iommulab run -- PROGRAM ARGS")
    try:
        kernel = Kernel(
            args.machine, args.version, credentials="host", dmabuf_get=args.dmabuf_get, caching=args.caching
        )
    except (ValueError, KeyError) as error:
        raise UserError(str(error.args[0])) from error
    with kernel:
        for address in args.bind:
            try:
                take(kernel, address)
            except FileNotFoundError as error:
                raise UserError(f"{args.machine} has no PCI function {address}") from error
            except KernelError as error:
                raise UserError(f"vfio-pci does not take {address}: {error.why}") from error
        try:
            status = run_program(kernel, program)
        except CannotRun as error:
            raise UserError(str(error)) from error
    return 128 - status if status < 0 else status
