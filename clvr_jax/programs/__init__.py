"""Compiled programs that are stored on disk, so that another process neither traces nor compiles them."""

from clvr_jax.programs.function import StoredFunction, making_programs
from clvr_jax.programs.settings import active_store, enable_program_store, program_store
from clvr_jax.programs.store import ProgramStore
from clvr_jax.programs.values import stored_value

__all__ = [
    "ProgramStore",
    "StoredFunction",
    "active_store",
    "enable_program_store",
    "making_programs",
    "program_store",
    "stored_value",
]
