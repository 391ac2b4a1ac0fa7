"""The exception for users' mistakes, for all rooms but `modeling`, which defines it.

(`modeling` imports nothing from the other rooms.)
"""

from modeling.errors import InputError

__all__ = ["InputError"]
