"""A killed training goes on, and a damaged checkpoint is refused."""

import json

import pytest

import crash
import few_optimizations


@pytest.mark.promotes
@pytest.mark.slow
def test_a_killed_training_goes_on_and_a_damaged_checkpoint_is_refused(
    tmp_path, monkeypatch
):
    for name, value in few_optimizations.ENVIRONMENT.items():  # all compile alike
        monkeypatch.setenv(name, value)
    output = tmp_path / "results" / "crash.json"
    some = ["--kills", "1", "--steps", "15", "--output", str(output)]
    assert crash.main(some) == 0
    found = json.loads(output.read_text())
    assert found["kills"] == 1
    assert (
        "cannot be read: move it away to go on from step 10"
        in found["refused"]["truncated"]
    )
    assert found["refused"]["foreign"].endswith("was not saved by this script")
