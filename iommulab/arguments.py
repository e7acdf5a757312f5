"""Words on the command line: what is wrong with one is told in one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

DEFAULT_CACHING = "always"


class Parser(argparse.ArgumentParser):
    """argparse's, without the usage of some ten lines before what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help says more)\n")


def whole(low: int, high: int) -> Callable[[str], int]:
    """A whole number from `low` to `high`, decimal or 0x…"""

    def convert(text: str) -> int:
        try:
            number = int(text, 0)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {low} to {high}")
        return number

    return convert


def seconds(text: str) -> float:
    """A time of more than 0 and less than a million seconds."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no time in seconds")
    return number


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--dmabuf-get and --caching, as `Kernel` takes them."""
    parser.add_argument(
        "--dmabuf-get",
        choices=("fd", "0"),
        default="fd",
        help="what the model's DMABUF_GET returns; 0 is the fault of 7.3 as released (default: %(default)s)",
    )
    parser.add_argument(
        "--caching",
        default=DEFAULT_CACHING,
        metavar="always|never|random[:SEED]",
        help="what the model's hardware keeps of what it read until it is told not to (default: %(default)s)",
    )
