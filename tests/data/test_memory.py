"""Names in shared memory that killed processes left."""

from curate.data.memory import sweep


def test_names_that_nobody_has_open_are_removed_and_no_others(tmp_path):
    for name in ("000001_locals", "000002_barrier", "000003_other", "mine"):
        (tmp_path / name).touch()
    with (tmp_path / "000002_barrier").open("rb"):
        assert sweep(tmp_path) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"000002_barrier", "000003_other", "mine"}
    assert sweep(tmp_path) == 1
