"""Options are loaded thousands of times here."""

import copy
import functools

import pytest
from omegaconf import OmegaConf

structured = functools.cache(OmegaConf.structured)


@pytest.fixture(autouse=True)
def _schemas_once(monkeypatch):
    """omegaconf looks through a schema in 12 ms, and copies what it found there in 2."""
    monkeypatch.setattr(OmegaConf, "structured", lambda schema: copy.deepcopy(structured(schema)))
