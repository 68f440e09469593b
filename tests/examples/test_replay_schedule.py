"""The replay of schedules: drafts are recorded at each place, and times follow from the steps alone."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import replay_schedule
from replay_schedule import MACHINES, SOURCES, Machine
from tiny import tiny_llama

from rasd_integrations.engine.target import TargetModel


def test_widths_between_the_known_ones_lie_on_a_line():
    """Widths are filled up to the machine's multiple."""
    machine = Machine({1: 10.0, 5: 14.0, 9: 30.0}, 4)
    assert [machine.width(n) for n in (1, 2, 5, 6)] == [1, 5, 5, 9]
    assert [machine.ms(n) for n in (1, 3, 9, 17)] == [10.0, 12.0, 30.0, 30.0]


def test_an_answer_is_recorded_and_replayed(tmp_path, capsys):
    """One draft a token; every machine and kind of draft is a row, and drafts that fit save steps."""
    shared = SimpleNamespace(target=TargetModel(tiny_llama()))
    prompt = [*range(5, 25)] * 2
    made = [replay_schedule.record(shared, prompt, 60) for _ in range(2)]
    assert [len(m.drafts) for m in made] == [len(m.answer) for m in made]
    assert made[0].prompt_tokens == len(prompt)
    replay_schedule.write(made, path := tmp_path / "drafts.jsonl")
    again = replay_schedule.read(path)
    assert [m.answer for m in again] == [m.answer for m in made]
    total, steps = replay_schedule.replay(again, MACHINES["GPU"], SOURCES["auto"], 0, 0)
    assert steps == sum(len(m.answer) for m in made)
    assert total == pytest.approx(steps * 5.0, rel=0.2)
    replay_schedule.main(["replay", str(path), "--seeds", "1"])
    table = json.loads(capsys.readouterr().out)
    assert len(table) == len(MACHINES) * len(SOURCES)
    assert all(row["schedule"] > 0 for row in table)
