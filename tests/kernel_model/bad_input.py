"""Throw bad input at the model, in a child process, and see that nothing breaks.

    python -m tests.kernel_model.bad_input [--seconds N | --count N] [--seed S] [--calls N] [--machine NAME]

A seed is a program: some hundred calls of `bad_input_calls`, carried out by `bad_input_world` on a fresh kernel, which
also says what must hold. The child runs seed after seed; if it fails, dies or stops answering, the parent finds the
seed's calls again, leaves out whatever is not needed for the failure, prints the rest decoded, and the command that
repeats it. Exit status 0: nothing was found. 1: something was. The seeds are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import select
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE), str(_HERE.parent.parent)]

from bad_input_calls import Generator  # noqa: E402
from bad_input_world import World  # noqa: E402

#: Seconds in which a whole program must end, whatever else the computer does.
HANG = 60
MODULE = "tests.kernel_model.bad_input"


# -- the child ---------------------------------------------------------------------------------------------------------


def run_program(machine: str, seed: int, calls: int, given: list[Any] | None, log: TextIO | None) -> None:
    """One program, drawn from `seed` or `given`. Raises what it finds; `log` gets each call before it is made."""
    world = World(machine)
    generator = Generator(seed)
    for index in range(calls if given is None else len(given)):
        call = generator.call(*world.contents()) if given is None else given[index]
        if log is not None:
            log.write(json.dumps(call) + "\n")
            log.flush()
        ended = world.run(call)
        if log is not None:
            log.write(f"# {ended}\n")
    world.end()


def child(options: argparse.Namespace) -> int:
    given = None
    if options.program:
        lines = Path(options.program).read_text().splitlines()
        given = [json.loads(line) for line in lines if line and not line.startswith("#")]
    seed, last = options.seed, options.seed + options.count
    until = time.monotonic() + options.seconds if options.seconds else float("inf")
    with open(options.log, "w", encoding="utf-8") if options.log else contextlib.nullcontext() as log:
        while seed < last and time.monotonic() < until:
            print(f"seed {seed}", flush=True)
            faulthandler.dump_traceback_later(HANG, exit=True)
            try:
                run_program(options.machine, seed, options.calls, given, log)
            except BaseException as error:
                faulthandler.cancel_dump_traceback_later()
                print("failed " + json.dumps({"what": f"{type(error).__name__}: {error}", "where": _where(error)}))
                traceback.print_exc()
                return 1
            seed += 1
    return 0


def _where(error: BaseException) -> str:
    """What makes two failures the same one: the kind, and the place in the model where it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "bad_input" not in frame.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else str(error).split("(")[0][:24]
    return f"{type(error).__name__} {place}"


# -- the parent --------------------------------------------------------------------------------------------------------


class Outcome:
    """How a child ended."""

    def __init__(self, status: int, seed: int, seeds: int, what: str, where: str, noise: str) -> None:
        self.ok = status == 0
        self.seed = seed
        self.seeds = seeds
        self.what = what or f"the process ended with status {status}"
        self.where = where or f"status {status}"
        self.noise = noise


def start(*arguments: str, show: bool = False) -> Outcome:
    """Run a child to its end, or kill it when it says nothing for longer than `HANG`."""
    command = [sys.executable, "-X", "faulthandler", "-m", MODULE, "--child", *arguments]
    with tempfile.TemporaryFile("w+") as noise:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=noise, cwd=_HERE.parent.parent, text=True, bufsize=1
        )
        assert process.stdout is not None
        seed, seeds, what, where = -1, 0, "", ""
        while True:
            if not select.select([process.stdout], [], [], HANG + 15)[0]:
                process.kill()
                what, where = "the process hangs", "hang"
                break
            line = process.stdout.readline()
            if not line:
                break
            if line.startswith("seed "):
                seed, seeds = int(line.split()[1]), seeds + 1
            elif line.startswith("failed "):
                found = json.loads(line.removeprefix("failed "))
                what, where = found["what"], found["where"]
        status = process.wait()
        process.stdout.close()
        noise.seek(0)
        return Outcome(status, seed, seeds, what, where, noise.read())


def shrink(program: list[str], fails: Any, seconds: float) -> list[str]:
    """Leave out calls, the larger pieces first, as long as the rest still fails in the same way."""
    until = time.monotonic() + seconds
    piece = max(len(program) // 2, 1)
    while time.monotonic() < until:
        position, shorter = 0, False
        while position < len(program) and time.monotonic() < until:
            rest = program[:position] + program[position + piece :]
            if rest and fails(rest):
                program, shorter = rest, True
            else:
                position += piece
        if piece == 1 and not shorter:
            break
        piece = max(piece // 2, 1)
    return program


def explain(options: argparse.Namespace, outcome: Outcome) -> None:
    """Print how a seed fails, as shortly as it can be had."""
    with tempfile.TemporaryDirectory() as scratch:
        log, path = Path(scratch, "log"), Path(scratch, "program")
        common = ["--machine", options.machine, "--calls", str(options.calls)]
        again = start("--seed", str(outcome.seed), "--count", "1", "--log", str(log), *common)
        print(f"\nseed {outcome.seed}: {outcome.what}\n{outcome.noise.rstrip()}")
        if again.ok:
            print("alone, the seed does not fail: it needs what earlier seeds left in the process")
            return
        program = [line for line in log.read_text().splitlines() if not line.startswith("#")]

        def fails(lines: list[str]) -> bool:
            path.write_text("\n".join(lines))
            return start("--program", str(path), "--count", "1", *common).where == again.where

        if fails(program):
            program = shrink(program, fails, options.shrink)
        path.write_text("\n".join(program))
        start("--program", str(path), "--count", "1", "--log", str(log), *common)
        print(f"\nThe calls that lead to it ({len(program)}), each with how it ended:")
        print(log.read_text().rstrip())
        kept = Path(tempfile.gettempdir(), f"bad-input-{outcome.seed}.calls")
        kept.write_text("\n".join(program) + "\n")
        print(f"\nagain: python -m {MODULE} --seed {outcome.seed} --count 1 {' '.join(common)}")
        print(f"just these calls: python -m {MODULE} --child --program {kept} --count 1")


def main() -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=0, help="how long to go on (default: until --count)")
    parser.add_argument("--count", type=int, default=0, help="how many seeds (default: 100, or no end with --seconds)")
    parser.add_argument("--seed", type=int, help="the first seed (default: a new one)")
    parser.add_argument("--calls", type=int, default=250, help="calls of a program")
    parser.add_argument("--machine", default="q35-vtd-legacy", help="the machine under the kernel")
    parser.add_argument("--shrink", type=float, default=60, help="seconds for making a failure short")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--program", help=argparse.SUPPRESS)
    parser.add_argument("--log", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.seed is None:
        options.seed = int.from_bytes(os.urandom(4), "little")
    if not options.count:
        options.count = 1 << 40 if options.seconds else 100
    if options.child:
        return child(options)
    outcome = start(
        *("--seed", str(options.seed), "--count", str(options.count), "--seconds", str(options.seconds)),
        *("--calls", str(options.calls), "--machine", options.machine),
    )
    print(f"seeds {options.seed} to {outcome.seed}: {outcome.seeds} programs of {options.calls} calls")
    if outcome.ok:
        return 0
    explain(options, outcome)
    return 1


if __name__ == "__main__":
    sys.exit(main())
