import pytest

from data.loader import worker_count


@pytest.mark.parametrize("cores, ranks, workers", [(2, 1, 2), (64, 1, 8), (8, 4, 2), (2, 8, 1)])
def test_workers_are_by_default_at_most_one_per_core(monkeypatch, cores, ranks, workers):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert worker_count() == workers
    assert (worker_count(0), worker_count(99)) == (0, 99)
