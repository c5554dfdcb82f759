"""A killed training goes on, and a damaged checkpoint is refused."""

import json

import pytest

import crash


@pytest.mark.promotes
@pytest.mark.slow
def test_a_killed_training_goes_on_and_a_damaged_checkpoint_is_refused(tmp_path):
    output = tmp_path / "results" / "crash.json"
    assert crash.main(["--kills", "1", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["kills"] == 1
    assert (
        "cannot be read: move it away to go on from step 55"
        in found["refused"]["truncated"]
    )
    assert found["refused"]["foreign"].endswith("was not saved by this script")
