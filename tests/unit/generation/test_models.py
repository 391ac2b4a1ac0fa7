import numpy as np
import yaml

from generation import models


def test_classes_that_a_run_never_saw(tmp_path, monkeypatch):
    run, cache = tmp_path / "run", tmp_path / "cache"
    (run / "checkpoints").mkdir(parents=True), cache.mkdir()
    data = {"params": {"pretokenization": str(cache)}}
    (run / "config.yaml").write_text(yaml.safe_dump({"dataset": data}))

    class Cache:
        labels = np.array([0, 2, 2])

    monkeypatch.setattr(models, "open_tokens", lambda folder: Cache if folder == str(cache) else 1)
    assert models.untrained_classes(str(run), (0, 1, 2, 3)) == [1, 3]
    assert models.untrained_classes(str(run), (2,)) == []
    assert models.untrained_classes(str(run / "generator.bin"), (1,)) == []  # a file says nothing
    cache.rmdir()
    assert models.untrained_classes(str(run), (1,)) == []
