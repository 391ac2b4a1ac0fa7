import torch

from experiments.finetuning import arrival, rows_of, with_normal_rows
from modeling.generator import Generator
from tests.tiny import tiny_generator


def test_a_run_arrives_at_the_first_step_that_is_as_good():
    falling = {10: 3.0, 20: 2.0, 30: 2.5, 40: 1.0}
    assert arrival(falling, 2.0, -1) == 20 and arrival(falling, 0.5, -1) is None
    rising = {10: 20.0, 20: 25.0, 30: 24.0}
    assert arrival(rising, 24.5, 1) == 20 and arrival(rising, 26.0, 1) is None


def test_normal_rows_of_new_classes_replace_the_old_classes_alone():
    config = tiny_generator(codebook_size=256, condition_num_classes=5)
    old = Generator(config)
    state = with_normal_rows(old.state_dict(), 1)
    Generator(config).load_state_dict(state)
    before, after = old.embeddings.weight, state["embeddings.weight"]
    assert torch.equal(after[:257], before[:257]) and torch.equal(after[-1], before[-1])
    assert 0.015 < after[257:-1].std() < 0.025 and after[257:-1].std(0).min() > 0


def test_the_table_holds_last_values_arrivals_and_means():
    def kind(arrives):
        curves = {"scratch": {3: 1.0}, "finetuned": {1: 0.9}}
        return {"goal": 1.0, "curves": curves, "arrives": arrives}

    starts = {"mean": [{1: 2.0}, {1: 4.0}], "normal": [{1: 5.0}, {1: 5.0}]}
    results = {"steps": 3, "tokenizer": kind(1), "generator": kind(None), "starts": starts}
    lines = rows_of(results)
    assert "| tokenizer, PSNR in dB | 1.000 | 0.900 | 1 |" in lines
    assert "| generator, nats per code | 1.000 | 0.900 | none |" in lines
    assert "| at the mean of the old classes | 3.0000 |" in lines
    assert "| normal, as a new generator | 5.0000 |" in lines
