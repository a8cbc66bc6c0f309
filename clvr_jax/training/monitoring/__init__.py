"""Where the wall time of a run goes (goodput), and one line in the log for what holds it up."""

from clvr_jax.training.monitoring.clock import Goodput, active_goodput, phase
from clvr_jax.training.monitoring.ledger import read_ledger, read_ledgers

__all__ = ["Goodput", "active_goodput", "phase", "read_ledger", "read_ledgers"]
