"""`iommulab bench`: what calls and DMA cost on the model, beside the real kernel or the physical limit.

Ratios within one run mean something, bare figures little: where a kernel image is given, both the real kernel and the
model are measured in the same guest, by the same client; where this host has a /dev/iommu, both on the host. DMA on the
model stands beside `ctypes.memmove` of the same size, what an IOMMU looks up beside `dict.get`. A ratio over its budget
is marked, and the command still exits 0: speed is reported, not tested.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from iommulab.arguments import seconds, whole
from iommulab.backends import model
from iommulab.errors import UserError
from iommulab.files import check_writable, write
from iommulab.guest import make_guest
from iommulab.kernel_images import Image, find_image
from iommulab.measure import AREA_COUNTS, Figures
from iommulab.measure.client import client_figures
from iommulab.measure.dma import dma_figures, memmove_figures
from iommulab.measure.units import unit_figures
from iommulab.terminal import console
from kernel_model.kernel import Kernel
from uapi.backend import DEV_IOMMU
from uapi.linux import LinuxBackend

#: Budgets as ratios: figures whose names start so, against the real kernel or memmove.
_IOCTL_BUDGET, _GIB_BUDGET, _SCALE_BUDGET = 3.0, 1.0, 2.0
_DMA_BUDGETS = {"4 KiB": 3.0, "1 MiB": 1.5}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result: both figures in microseconds, their ratio, and the most that it should be."""

    name: str
    model: float
    peer: float | None
    budget: float | None

    @property
    def ratio(self) -> float | None:
        return None if self.peer is None else self.model / self.peer

    @property
    def over(self) -> bool:
        return self.ratio is not None and self.budget is not None and self.ratio > self.budget


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "bench", help="what calls and DMA cost, as ratios", description=__doc__.splitlines()[0].partition(": ")[2]
    )
    parser.add_argument(
        "--on",
        choices=("auto", "model", "linux", "vm"),
        default="auto",
        help="where the real kernel is (default: auto)",
    )
    parser.add_argument("--kernel-image", type=Path, metavar="PATH", help="the image to boot for --on vm")
    parser.add_argument(
        "--seconds", type=seconds, default=0.3, metavar="SECONDS", help="time for one figure (default: 0.3)"
    )
    parser.add_argument(
        "--areas",
        type=whole(AREA_COUNTS[0], AREA_COUNTS[-1]),
        default=AREA_COUNTS[-1],
        metavar="N",
        help="the largest number of mappings (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.json is not None:
        check_writable(args.json)
    where = args.on
    if where == "auto":
        where = "vm" if args.kernel_image else "linux" if os.path.exists(DEV_IOMMU) else "model"
    if where == "linux" and not os.path.exists(DEV_IOMMU):
        raise UserError(f"this kernel has no {DEV_IOMMU}; --on vm measures one in a guest")
    say = Console(stderr=True)
    ours, real, place = _client_columns(where, args, say)
    rows = [*_call_rows(ours, real), *_dma_rows(args.seconds, say), *_unit_rows(args.seconds, say)]
    _print(rows, real is not None, place)
    if args.json is not None:
        write(args.json, (json.dumps(_as_json(rows, place), indent=1) + "\n").encode())
    return 0


def _client_columns(where: str, args: argparse.Namespace, say: Console) -> tuple[Figures, Figures | None, str]:
    counts = tuple(count for count in AREA_COUNTS if count <= args.areas)
    if where == "vm":
        image = find_image(args.kernel_image, None)
        figures: list[Figures] = []
        accelerator = ""
        for name, backend in (("real kernel", "uapi.linux:LinuxBackend"), ("model", "iommulab.backends:model")):
            say.print(f"measuring the {name} in the guest")
            # A million areas take the guest's kernel a while and the guest's Python minutes.
            areas = min(args.areas, 100_000)
            lines, accelerator = _measure_in_guest(image, backend, args.seconds, areas)
            figures.append({line["name"]: line["us"] for line in lines})
        if args.areas > 100_000:
            say.print("measuring the model with more areas here")
            with Kernel() as kernel:
                figures[1] |= _scaling(dict(client_figures(kernel, args.seconds, counts)))
        return figures[1], figures[0], f"both in one guest of {image.release or image.path.name} ({accelerator})"
    with model() as kernel:
        say.print("measuring the model")
        ours = dict(_told(client_figures(kernel, args.seconds, counts), say))
    if where == "linux":
        say.print("measuring the real kernel")
        return (
            ours,
            dict(_told(client_figures(LinuxBackend(), args.seconds, counts), say)),
            f"both on {platform.release()}",
        )
    return ours, None, f"this host, Python {platform.python_version()}"


def _told(figures: Iterator[tuple[str, float]], say: Console) -> Iterator[tuple[str, float]]:
    for name, microseconds in figures:
        say.print(f"  {name}: {microseconds:.2f} µs", highlight=False)
        yield name, microseconds


def _scaling(figures: Figures) -> Figures:
    """The area figures measured here, as ratios to the smallest, so that they mean something beside a guest's."""
    return {f"{name} (host)": value for name, value in figures.items() if "among" in name}


def _measure_in_guest(image: Image, backend: str, seconds: float, areas: int) -> tuple[list[dict[str, Any]], str]:
    command = [sys.executable, "-m", "iommulab.measure", "--backend", backend]
    command += ["--seconds", str(seconds), "--areas", str(areas)]
    with tempfile.TemporaryDirectory(prefix="iommulab-bench-") as directory:
        guest = make_guest(image, "q35-vtd-legacy", Path(directory))
        guest.probe_kvm()
        text = guest.run(f'{shlex.join(command)} --output "$events"', limit=1200.0)
        return [json.loads(line) for line in text.splitlines()], guest.accelerator


def _call_rows(ours: Figures, real: Figures | None) -> Iterator[Row]:
    """Calls against the real kernel; the scaling figures against the smallest number of areas."""
    areas: dict[str, float] = {}
    for name, value in ours.items():
        if "among" in name:
            areas[name] = value
        peer = real.get(name) if real is not None else None
        budget = _GIB_BUDGET if "1 GiB, one domain" in name else _IOCTL_BUDGET
        yield Row(name, value, peer, budget)
    for suffix in ("", " (host)"):
        group = [(name, value) for name, value in areas.items() if name.endswith("(host)") == bool(suffix)]
        for name, value in group[2:]:
            small_name, small = group[1]
            yield Row(f"{name} / {small_name.split('among ')[1]}", value, small, _SCALE_BUDGET)


def _dma_rows(seconds: float, say: Console) -> Iterator[Row]:
    """DMA through a device's port, translated by the VT-d unit with a warm IOTLB, against memmove."""
    say.print("measuring DMA")
    limits = dict(memmove_figures(seconds))
    for name, value in dma_figures(seconds):
        size = name.split(", ")[-1]
        yield Row(name, value, limits[f"memmove {size}"], _DMA_BUDGETS.get(size) if "direct" in name else None)


def _unit_rows(seconds: float, say: Console) -> Iterator[Row]:
    """Each unit and kind of tables: translations, DMA, tables, invalidations; each beside the limit that it names."""
    say.print("measuring the IOMMUs")
    for figure in unit_figures(seconds):
        say.print(f"  {figure.name}: {figure.microseconds:.2f} µs", highlight=False)
        yield Row(figure.name, figure.microseconds, figure.limit, figure.budget)


def _print(rows: list[Row], compared: bool, place: str) -> None:
    table = Table(title=f"Microseconds a call, {place}", title_justify="left")
    for column in ("", "model", "real kernel or limit", "ratio", "budget"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(
            row.name,
            f"{row.model:,.2f}",
            "" if row.peer is None else f"{row.peer:,.2f}",
            f"[red]{ratio} over[/red]" if row.over else ratio,
            "" if row.budget is None or row.peer is None else f"{row.budget:g}",
        )
    console().print(table)
    over = sum(row.over for row in rows)
    print(f"{over} of {sum(row.ratio is not None and row.budget is not None for row in rows)} ratios are over budget")
    if not compared:
        print("no real kernel beside it: --kernel-image PATH measures one in a guest, with the model in the same guest")


def _as_json(rows: list[Row], place: str) -> dict[str, Any]:
    return {
        "place": place,
        "unit": "microseconds",
        "rows": [
            {"name": row.name, "model": row.model, "peer": row.peer, "ratio": row.ratio, "budget": row.budget}
            for row in rows
        ],
    }
