import errno
import fcntl
import multiprocessing
import time

from runtime.files import lock_folder
from tests.refusals import refusal


def hold(folder, held):
    lock = lock_folder(folder)
    held.set()
    time.sleep(60)
    lock.close()


def test_a_folder_is_locked_by_the_living_and_free_after_the_dead(tmp_path):
    fork = multiprocessing.get_context("fork")
    held = fork.Event()
    holder = fork.Process(target=hold, args=(tmp_path / "run", held))
    holder.start()
    assert held.wait(30)
    refusal(lambda: lock_folder(tmp_path / "run"), tmp_path / "run", "in use")
    holder.kill()
    holder.join()
    lock_folder(tmp_path / "run").close()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def without(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", without)
    lock_folder(tmp_path / "run").close()
    assert "run cannot be locked (No locks available)" in capsys.readouterr().err
