"""What a child gives up before it reads a byte of an image, and the little that it keeps.

Standard library only: every child imports it, and none may take long to start.
"""

from agent.executor.sandbox.enter import Limits, enter, isolate_descriptors
from agent.executor.sandbox.grants import Grants
from agent.executor.sandbox.kernel import is_withheld, probe, withhold_memory
from agent.executor.sandbox.landlock import withdrawn

__all__ = ["Grants", "Limits", "enter", "is_withheld", "isolate_descriptors", "probe", "withdrawn", "withhold_memory"]
