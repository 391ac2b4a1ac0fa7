"""The exception for users' mistakes. `modeling`, which imports no other package, defines it."""

from modeling.errors import InputError

__all__ = ["InputError"]
