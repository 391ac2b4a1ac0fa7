"""The exception for users' mistakes; `modeling` defines it, because `modeling` imports no other room."""

from modeling.errors import InputError

__all__ = ["InputError"]
