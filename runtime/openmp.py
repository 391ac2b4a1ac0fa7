"""How long OpenMP's waiting threads spin: programs import this before torch.

OpenMP reads its environment once, when torch loads it, so this cannot be a function that a program
calls later. By default GNU OpenMP's threads spin for some milliseconds before they sleep, which keeps
other work from the cores: beside one busy process, training on two cores becomes up to ten times
slower. If they sleep at once, the next operator waits for them. 10,000 turns (about 0.2 ms) span the
gap between two operators. What the user has set stays.
"""

import os

if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    os.environ["GOMP_SPINCOUNT"] = "10000"
