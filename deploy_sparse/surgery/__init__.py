"""Surgery: from masks to a physically smaller network that computes the same function."""

from .compact import Compact, compact, load_compact
from .graph import channel_groups
from .plan import SurgeryPlan, plan_from_ticket
from .verify import Parity, verify

__all__ = [
    "Compact",
    "Parity",
    "SurgeryPlan",
    "channel_groups",
    "compact",
    "load_compact",
    "plan_from_ticket",
    "verify",
]
