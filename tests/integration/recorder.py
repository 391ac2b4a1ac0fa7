"""Watches a training program from outside, through torch's own global hooks.

Knows the models and the optimizers of torch, and nothing of the loop. The models start from the
deterministic weights of `tests/golden/fill.py` instead of random ones.
"""

import json
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook

from data.order import SampleOrder
from modeling.generator import Generator
from modeling.tokenizer import Tokenizer
from tests.golden.fill import fill_value
from train_tokenizer.discriminator import Discriminator


def filled(name, tensor):
    return torch.from_numpy(fill_value(name, tuple(tensor.shape), 1))


def starting_weights(model, changes=None):
    """Published names -> values of every entry; `changes` maps a name to its own function."""
    changes = changes or {}
    return {
        name: changes[name](name, tensor) if name in changes else filled(name, tensor)
        for name, tensor in model.state_dict().items()
        if not name.endswith(".kernel")  # the blur of the discriminator keeps its values
    }


class Recorder:
    """What a run computes: `steps` (one per optimizer step), `passes` (one per forward pass of the
    trained model, with the weights before it), `models` by kind: tokenizer, critic, generator."""

    def __init__(self, changes=None):
        self.changes = changes
        self.models, self.steps, self.passes = {}, [], []

    # -------------------------------------------------- from outside
    @contextmanager
    def watching(self, monkeypatch):
        """Start models from filled weights, samples in their order; record what a program does."""
        self._fill_after(monkeypatch, Tokenizer, "reset_parameters", "tokenizer")
        self._fill_after(monkeypatch, Generator, "reset_parameters", "generator")
        self._fill_after(monkeypatch, Discriminator, "__init__", "critic")
        in_order = lambda order, position: divmod(position, order.items)  # noqa: E731
        monkeypatch.setattr(SampleOrder, "sample", in_order)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as the figures were made
        with ExitStack() as stack:
            for handle in (
                register_module_forward_pre_hook(self._before_pass),
                register_module_forward_hook(self._after_pass),
                register_optimizer_step_pre_hook(self._before_step),
            ):
                stack.callback(handle.remove)
            stack.callback(torch.set_num_threads, threads)
            yield self

    def _fill_after(self, monkeypatch, kind, method, name):
        original = getattr(kind, method)

        def start(model, *args, **kwargs):
            original(model, *args, **kwargs)
            if next(model.parameters()).is_meta:
                return  # built for its sizes only
            model.load_state_dict(starting_weights(model, self.changes), strict=False)
            assert name not in self.models, f"the program builds a second {name}"
            self.models[name] = model

        monkeypatch.setattr(kind, method, start)

    # -------------------------------------------------- hooks
    def _is_trained(self, module):
        return any(module is self.models.get(name) for name in ("tokenizer", "generator"))

    def _before_pass(self, module, inputs):
        if self._is_trained(module):
            self.passes.append({"weights": self.weights(), "inputs": inputs})

    def _after_pass(self, module, inputs, output):
        if self._is_trained(module):
            self.passes[-1]["output"] = output

    def _before_step(self, optimizer, args, kwargs):
        names = {
            id(p): (kind, name)
            for kind, model in self.models.items()
            for name, p in model.named_parameters()
        }
        step = {"groups": [], "gradients": {}, "passes": len(self.passes)}
        for group in optimizer.param_groups:
            step["groups"].append({k: v for k, v in group.items() if k != "params"})
            for p in group["params"]:
                step["kind"], name = names[id(p)]
                step.setdefault("decay", {})[name] = group["weight_decay"]
                if p.grad is not None:
                    step["gradients"][name] = p.grad.detach().double().norm().item()
        self.steps.append(step)

    # -------------------------------------------------- results
    def weights(self):
        """Copies of all weights of the models now, by kind and name."""
        return {
            kind: {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
            for kind, model in self.models.items()
        }

    def weights_after_each_step(self):
        """Weights after step 1, 2, …: those that the next step's first forward pass finds.

        So they hold whatever the loop changes in a step, before or after its optimizers.
        """
        later = [step["passes"] for step in self.steps[:-1]]
        return [self.passes[index]["weights"] for index in later] + [self.weights()]


def records(folder):
    """The training records of metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line or "critic" in line]
