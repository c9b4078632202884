"""What a run needs before it starts: memory of each GPU, operations and hours, disk; and which layouts fit."""

__all__ = ["Layout", "MemoryPlan", "layout_of", "plan_memory"]

from megatron_sfr.planning.layout import Layout, layout_of
from megatron_sfr.planning.memory import MemoryPlan, plan_memory
