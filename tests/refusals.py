"""What every refusal is held to, in place of its wording."""

import pytest

from runtime.errors import InputError


def refusal(call, *named) -> str:
    """The one line in which `call()` refuses: it names all of `named`, and says more than the names."""
    with pytest.raises(InputError) as caught:
        call()
    message = rest = str(caught.value)
    assert "\n" not in message
    for name in map(str, named):
        assert name in message, message
        rest = rest.replace(name, "")
    assert len(rest.split()) > 1, message
    return message
