"""The studies' own code: the search and the record of runs.

If it fails, the studies that the advice on settings rests on cannot be repeated.
"""

import contextlib
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import choosing
import methods
import rosenbrock
import runs
import study
import tasks
import training
from microadam_optax import _moments

OURS = methods.DEFAULT

TARGET = np.linspace(-1, 1, 16, dtype=np.float32)


def quadratic():
    """A task of 16 numbers, of which the seed shifts the start."""
    return tasks.Task(
        init=lambda seed: {"x": jnp.full(16, 0.1 * seed)},
        loss=lambda params, batch: jnp.mean((params["x"] - batch) ** 2),
        batches=lambda _: itertools.repeat(TARGET),
        evaluate=lambda params: {
            "validation loss": float(((params["x"] - TARGET) ** 2).mean())
        },
    )


def rows_of(score):
    return [{"figures": {"validation loss": score}}]


@pytest.mark.parametrize(("best", "visited"), [(1.0, 5), (0.25, 6), (16.0, 8)])
def test_the_search_ends_with_the_best_inside(best, visited):
    tried = []

    def trained(rate):
        tried.append(rate)
        return rows_of(abs(math.log2(rate / best)))

    assert study.search(1.0, trained) == best
    assert len(tried) == len(set(tried)) == visited
    assert min(tried) < best < max(tried)


def test_the_search_has_an_end_and_shuns_divergence():
    tried = []

    def trained(rate):
        tried.append(rate)
        return rows_of(math.nan if rate > 1 else rate)

    assert study.search(1.0, trained) == min(tried)
    assert len(tried) == study.WIDEST


def test_accuracy_is_better_where_higher():
    low, high = ({"figures": {"accuracy": x, "loss": 0.0}} for x in (0.5, 0.9))
    assert runs.score(high) < runs.score(low)


@pytest.mark.promotes
@pytest.mark.slow
def test_a_study_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """Nothing runs twice; what is missing runs; the record says what came of it."""
    monkeypatch.setattr(runs.Runs.__init__, "__defaults__", (tmp_path,))
    some = {"Adam": methods.PEERS["Adam"]._replace(centre=0.1)}
    small = study.Study("a bowl", quadratic, some, steps=30, long=60, evaluations=3)
    monkeypatch.setattr(study, "STUDIES", {"bowl": small})
    count = 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return whole(*args, **kwargs)

    whole = training.run
    monkeypatch.setattr(training, "run", counted)
    study.conduct("bowl")
    done, record = count, runs.Runs("bowl")
    assert len(record.rows) == done
    study.conduct("bowl")
    assert count == done
    kept = json.loads(record.file.read_text())
    lost = kept["runs"].pop()
    record.file.write_text(json.dumps(kept))
    study.conduct("bowl")
    assert count == done + 1
    assert runs.Runs("bowl").rows[-1]["figures"] == lost["figures"]
    found = runs.outcome(runs.Runs("bowl"), "Adam", 60, 3)
    assert len(found.values) == 3
    assert found.mean < 0.01
    assert found.state_bytes == pytest.approx(8.25)  # with Adam's count
    assert [step for step, _ in found.rows[0]["curve"]] == [20, 40, 60]
    assert "1/1 Adam" in capsys.readouterr().out


def test_only_complete_outcomes_count(tmp_path):
    record = runs.Runs("some", tmp_path)
    for rate, seed, loss in [(0.1, 0, 1.0), (0.1, 1, 1.2), (0.2, 0, 0.5)]:
        key = {"method": "Adam", "learning_rate": rate, "seed": seed, "steps": 9}
        record.rows.append({**key, "state_bytes": 8.0, "figures": {"loss": loss}})
    found = runs.outcome(record, "Adam", 9, seeds=2)
    assert found.rate == 0.1
    assert found.mean == pytest.approx(1.1)
    assert found.spread == pytest.approx(math.sqrt(0.02))
    assert runs.outcome(record, "Adam", 9, seeds=3) is None
    assert runs.by_rate(record, "Adam", 9, 1) == [(0.1, 1.0), (0.2, 0.5)]


@pytest.mark.parametrize("name", methods.ALL)
@pytest.mark.promotes
def test_every_optimizer_can_be_made(name):
    params = {"w": jnp.ones((64, 128)), "b": jnp.ones(8)}
    tx = training.optimizer(methods.ALL[name], 1e-3)
    state = jax.eval_shape(tx.init, params)
    updates, _ = jax.eval_shape(tx.update, params, state, params)
    assert updates["w"].shape == (64, 128)


@pytest.mark.slow
def test_tasks_depend_on_the_seed_alone():
    task = tasks.digits()
    for seed in (0, 1):
        one, two = (next(task.batches(seed))[0] for _ in range(2))
        np.testing.assert_array_equal(one, two)
    other = next(task.batches(1))[0]
    assert not np.array_equal(next(task.batches(0))[0], other)
    figures = task.evaluate(task.init(0))
    assert figures["test accuracy"] < 0.4  # ten classes, nothing learnt


@pytest.mark.slow
def test_texts_differ():
    assert len(tasks.help_text()) > 300_000
    assert len(tasks.source_text()) > 300_000


def test_keep_largest():
    tx = rosenbrock.keep_largest(1)
    kept, _ = tx.update(jnp.array([1.0, -3.0]), tx.init(None))
    np.testing.assert_array_equal(kept, [0.0, -3.0])


def test_a_candidate_runs_with_its_own_exponent(tmp_path, monkeypatch):
    """And what is not run with one is as before."""
    monkeypatch.setattr(runs.Runs.__init__, "__defaults__", (tmp_path,))
    seen, before = [], _moments.EXPONENT

    def run(*args, **_):
        *_, rate, seed, steps, _ = args
        seen.append((_moments.EXPONENT, rate, seed))
        row = {"learning_rate": rate, "seed": seed, "steps": steps}
        return {**row, "figures": {"validation loss": 0.0}}, None

    monkeypatch.setattr(training, "run", run)
    trial = choosing.Trial(quadratic, 5, 0.1, "bowl")
    for exponent in (0.75, before):
        one = choosing.Candidate(1, 0.25, exponent=exponent)
        rows = choosing.rows_of(trial, one, quadratic, 0.1, 1.0)
        assert [row["method"] for row in rows] == [one.title] * 3
    assert choosing.rows_of(trial, one, quadratic, 0.1, 0.5)[0]["learning_rate"] == 0.05
    assert seen[:3] == [(0.75, 0.1, seed) for seed in range(3)]
    assert seen[3:] == [(before, 0.1, seed) for seed in range(3)] + [(before, 0.05, 0)]
    assert before == _moments.EXPONENT


def test_candidates_are_what_the_records_name():
    titles = [one.title for one in choosing.candidates((0.5, 0.75))]
    assert len(set(titles)) == 20
    assert set(methods.OURS) - {methods.PAPER} <= set(titles)
    assert "MicroAdam (1, 4 %), blocks of 64" in titles
    assert "MicroAdam (2, 6 %), exponent 0.75" in titles


def test_as_it_comes_it_trains_at_adams_rate(tmp_path, monkeypatch):
    """Short runs at the best of Adam's short ones, longer ones at that of its longer."""
    monkeypatch.setattr(runs.Runs.__init__, "__defaults__", (tmp_path,))
    record, both = runs.Runs("bowl"), {x: methods.MAIN[x] for x in ("Adam", OURS)}
    bowl = study.Study("a bowl", quadratic, both, steps=5, seeds=2, long=9)
    work = study.Work(bowl, record, quadratic, OURS)
    with pytest.raises(SystemExit, match="Adam has not run for 5 steps"):
        work.best()
    for rate, steps in ((0.2, 5), (0.1, 9)):
        for seed in range(2):
            key = {"method": "Adam", "learning_rate": rate, "seed": seed, "steps": steps}
            record.add({**key, "state_bytes": 8.0, "figures": {"loss": rate}})
    rate, found = work.best()
    assert rate == 0.1
    assert [x["steps"] for x in found] == [9, 9]
    ours = work.runs.find(method=OURS)
    assert {(x["steps"], x["learning_rate"]) for x in ours} == {(5, 0.2), (9, 0.1)}


def test_a_run_on_another_machine_says_so(tmp_path, monkeypatch):
    record = runs.Runs("some", tmp_path)
    for cpu in ("one", "one", "other"):
        found = {"processor": cpu, "command": f"python {cpu}.py"}
        monkeypatch.setattr(runs.common, "machine", found.copy)
        record.add({"method": "Adam", "seed": len(record.rows)})
    again = runs.Runs("some", tmp_path)
    assert again.machine == {"processor": "one", "command": "python one.py"}
    assert [x.get("machine") for x in again.rows] == [None, None, {"processor": "other"}]


def test_texts_of_another_python_are_refused(tmp_path, monkeypatch):
    """They are other data, of which no two optimizers can be compared."""
    found = {"python": "3.11.7", "command": ""}
    monkeypatch.setattr(runs.common, "machine", found.copy)
    for name, refused in (("language", True), ("digits", False)):
        found["python"] = "3.11.7"
        runs.Runs(name, tmp_path).add({"method": "Adam"})
        found["python"] = "3.11.9"
        runs.Runs(name, tmp_path).add({"method": "Adam"})
        found["python"] = "3.12.1"
        with pytest.raises(SystemExit) if refused else contextlib.nullcontext() as said:
            runs.Runs(name, tmp_path).add({"method": "Adam"})
        assert not refused or "are those of Python 3.11.7; those of 3.12.1 are" in str(
            said
        )
        assert len(runs.Runs(name, tmp_path).rows) == 3 - refused
