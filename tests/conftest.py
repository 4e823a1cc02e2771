"""What every test has: tests/support on the path, and no deadlines of hypothesis, since tests assert no times."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
settings.register_profile("slotd", deadline=None)
settings.load_profile("slotd")
