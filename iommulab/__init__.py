"""iommulab: what a person runs and calls."""

from iommulab.connect import connect

__all__ = ["connect"]
