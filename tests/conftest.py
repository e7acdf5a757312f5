"""What all of the project's tests share.

Property tests draw the same examples every time, so that a run says something about the change and not about luck.
`make soak` (IOMMULAB_SOAK=1) draws new ones, and more.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("fixed", derandomize=True)
QUICK = bool(os.environ.get("IOMMULAB_SOAK_QUICK"))
settings.register_profile("soak", max_examples=100 if QUICK else 2000, deadline=None)
settings.load_profile("soak" if os.environ.get("IOMMULAB_SOAK") else "fixed")
