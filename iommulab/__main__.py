"""`python -m iommulab`."""

from __future__ import annotations

import sys

from iommulab.cli import main

if __name__ == "__main__":
    sys.exit(main())
