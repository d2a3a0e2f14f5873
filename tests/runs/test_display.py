"""The display of a run's steps, on a real pseudo-terminal and in a log."""

import contextlib
import io
import os
import re
import termios
import threading

from nanogpt.runs.display import StepDisplay


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run_six_steps(display, clock, seconds=1.0):
    display.start(6)
    display.evaluation(0, "step:0/6 val_loss:10.8000", 10.8)
    for step in range(1, 7):
        clock.now += seconds
        display.step(step, f"step:{step}/6 train_time:{step}ms", 5.0 + step if step % 2 else None)
    clock.now += 1000
    display.evaluation(6, "step:6/6 val_loss:4.0000", 4.0)
    display.close()
    display.close()


def test_a_log_gets_every_evaluation_and_few_steps():
    stream, clock = io.StringIO(), Clock()
    run_six_steps(StepDisplay(stream, every_s=3, clock=clock), clock)
    assert stream.getvalue().splitlines() == [
        "step:0/6 val_loss:10.8000",
        "step:1/6 train_time:1ms",
        "step:4/6 train_time:4ms",
        "step:6/6 train_time:6ms",
        "step:6/6 val_loss:4.0000",
    ]


def on_terminal(work, monkeypatch):
    """What `work(stream)` writes to a terminal of 100 columns."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    ours, theirs = os.openpty()
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    chunks = []

    def read():
        # A terminal holds 4 KiB; it answers EIO once the other end is closed.
        with contextlib.suppress(OSError):
            while chunk := os.read(ours, 1 << 16):
                chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w", encoding="utf-8") as stream:
        work(stream)
    reader.join()
    os.close(ours)
    written = b"".join(chunks).decode()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)


def test_a_terminal_gets_a_bar_with_loss_speed_and_time_left(monkeypatch):
    clock = Clock()

    def work(stream):
        run_six_steps(StepDisplay(stream, clock=clock), clock, seconds=30)

    written = on_terminal(work, monkeypatch)
    assert "step:0/6 val_loss:10.8000" in written
    assert "3/6" in written
    assert "loss 8.0000  val 10.8000" in written
    assert "30,000 ms/step, 1:30 left" in written
    assert "0:00 left" in written
    assert "val 4.0000" in written
    assert "train_time" not in written  # step lines are log.txt's


def test_a_terminal_is_drawn_a_few_times_a_second_at_most(monkeypatch):
    clock = Clock()

    def work(stream):
        display = StepDisplay(stream, clock=clock)
        display.start(1000)
        for step in range(1, 501):
            clock.now += 0.01
            display.step(step, "")
        display.close()

    written = on_terminal(work, monkeypatch)
    assert 15 <= written.count("ms/step") <= 30


def test_a_resumed_run_measures_its_own_steps(monkeypatch):
    clock = Clock()

    def work(stream):
        display = StepDisplay(stream, clock=clock)
        display.start(1000, first_step=900)
        clock.now += 2
        display.step(901, "")
        display.close()

    assert "2,000 ms/step, 3:18 left" in on_terminal(work, monkeypatch)
