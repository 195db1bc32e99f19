"""Lines of long stages, on a clock of the test: when they come, and what they say."""

from __future__ import annotations

import logging
import re

import pytest

from megatron_moe2dense.common.log import logger, start_logging
from megatron_moe2dense.common.progress import Progress, StepLines, duration, progress


class Clock:
    """Stands still until it is set on."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger.name)
    return lambda: [record.getMessage() for record in caplog.records]


def test_durations_have_their_two_largest_units():
    assert [duration(s) for s in (0.4, 38, 725, 4 * 3600 + 52 * 60, 3 * 86400 + 4 * 3600)] == ["0s", "38s", "12m05", "4h52", "3d04h"]


def test_a_line_a_layer_with_its_rate_and_the_time_left(said):
    clock = Clock()
    with Progress("calibrate", "layer", 4, each=True, clock=clock) as shown:
        for _ in range(4):
            clock.now += 15
            shown.update()
    assert said() == [
        "calibrate: 1/4 layers, 15 s/layer, ETA 45s",
        "calibrate: 2/4 layers, 15 s/layer, ETA 30s",
        "calibrate: 3/4 layers, 15 s/layer, ETA 15s",
        "calibrate: 4/4 layers, 15 s/layer, took 1m00",
    ]


def test_a_stage_under_two_seconds_says_nothing(said):
    clock = Clock()
    with Progress("calibrate", "layer", 4, each=True, clock=clock) as shown:
        for _ in range(4):
            clock.now += 0.49
            shown.update()
    assert said() == []


def test_lines_of_small_units_are_ten_seconds_apart_and_have_their_tokens(said):
    clock = Clock()
    with Progress("tokenise", "MB", 400, clock=clock) as shown:
        for _ in range(100):
            clock.now += 0.25
            shown.update(4, 1_000_000)
    assert said() == [
        "tokenise: 32/400 MB, 16 MB/s, 4,000,000 tokens/s, ETA 23s",
        "tokenise: 192/400 MB, 16 MB/s, 4,000,000 tokens/s, ETA 13s",
        "tokenise: 352/400 MB, 16 MB/s, 4,000,000 tokens/s, ETA 3s",
        "tokenise: 400/400 MB, 16 MB/s, 4,000,000 tokens/s, took 25s",
    ]


def test_a_layer_of_many_minutes_has_lines_within(said):
    clock = Clock()
    shown = Progress("calibrate", "layer", 2, each=True, clock=clock)
    for _ in range(10):
        clock.now += 12
        shown.update(0.1)
    assert said() == [
        "calibrate: 0/2 layers, 120 s/layer, ETA 3m48",
        "calibrate: 0/2 layers, 120 s/layer, ETA 3m12",
        "calibrate: 0/2 layers, 120 s/layer, ETA 2m36",
        "calibrate: 1/2 layers, 120 s/layer, ETA 2m00",
    ]


def test_what_an_earlier_run_did_is_not_taken_for_speed(said):
    clock = Clock()
    shown = Progress("convert", "layer", 48, done=40, each=True, clock=clock)
    clock.now += 10
    shown.update()
    assert said() == ["convert: 41/48 layers, 10 s/layer, ETA 1m10"]


def test_a_stage_that_fails_is_not_called_done(said):
    clock = Clock()

    def stage() -> None:
        with Progress("calibrate", "layer", 4, clock=clock):
            clock.now += 60
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stage()
    assert said() == []


def test_items_are_counted_when_they_are_worked_off(said, monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    monkeypatch.setattr("megatron_moe2dense.common.progress.time.monotonic", clock)
    for state in progress(iter([0, 1, 2]), "refit", "layer", 2, each=True, reached=lambda state: state):
        assert len(said()) == max(0, state - 1)  # the state before layer 0 is none
        clock.now += 4
    assert said() == ["refit: 1/2 layers, 8 s/layer, ETA 8s", "refit: 2/2 layers, 6 s/layer, took 12s"]


def test_steps_of_a_run_have_a_line_each_ten_the_first_and_after_a_silence():
    clock = Clock()
    lines, found = StepLines(7629, 10, clock), []
    for step in range(101, 125):
        clock.now += 2.3 if step < 121 else 31
        found.append(lines.ended(step))
    assert [line for line in found if line] == [
        "step 101/7629",
        "step 110/7629, ETA 4h48",
        "step 120/7629, ETA 4h47",
        "step 121/7629, ETA 7h47",
        "step 122/7629, ETA 10h29",
        "step 123/7629, ETA 12h57",
        "step 124/7629, ETA 15h12",
    ]
    assert StepLines(3, 10, clock).ended(2, always=True) == "step 2/3"
    assert lines.ended(7629) == "step 7629/7629"


def test_every_line_has_the_clock_time_and_no_carriage_return(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    handlers, propagate, level = logger.handlers[:], logger.propagate, logger.level
    clock = Clock()
    try:
        start_logging()
        with Progress("calibrate", "layer", 2, each=True, clock=clock) as shown:
            for _ in range(2):
                clock.now += 3
                shown.update()
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
    text = capsys.readouterr().err
    assert "\r" not in text
    lines = text.splitlines()
    assert len(lines) == 2
    assert all(re.match(r"\d\d-\d\d \d\d:\d\d:\d\d I calibrate: \d/2 layers", line) for line in lines)
