"""`python -m iommulab.measure --backend MODULE:FACTORY`: a client's figures as JSON; the bench runs it in a guest."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from contextlib import nullcontext

from iommulab.measure import AREA_COUNTS
from iommulab.measure.client import client_figures
from uapi.backend import Backend


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m iommulab.measure")
    parser.add_argument("--backend", required=True, metavar="MODULE:FACTORY")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for one figure")
    parser.add_argument("--areas", type=int, default=AREA_COUNTS[-1], help="the largest number of areas")
    parser.add_argument("--output", help="one JSON object a line: name and microseconds; standard output if not given")
    args = parser.parse_args()
    module, _, factory = args.backend.partition(":")
    kernel: Backend = getattr(importlib.import_module(module), factory)()
    counts = tuple(count for count in AREA_COUNTS if count <= args.areas)
    with open(args.output, "w", encoding="utf-8") if args.output else nullcontext(sys.stdout) as output:
        for name, microseconds in client_figures(kernel, args.seconds, counts):
            output.write(json.dumps({"name": name, "us": microseconds}) + "\n")
            output.flush()
    kernel.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
