"""The digits' images, which a second run of the quickstart leaves alone."""

from quickstart.digits import write_digits


def test_files_are_written_again_only_if_they_differ(tmp_path):
    write_digits(tmp_path)
    files = sorted(tmp_path.rglob("*.png"))
    assert len(files) == 1797
    damaged, times = files[0], {file: file.stat().st_mtime_ns for file in files}
    content = damaged.read_bytes()
    damaged.write_bytes(content[:10])
    write_digits(tmp_path)
    assert damaged.read_bytes() == content
    assert {file: file.stat().st_mtime_ns for file in files[1:]} == {f: times[f] for f in files[1:]}
