"""What `docker stop` and Ctrl-C do: both end the run at once, with an exit code that tells them."""

import multiprocessing
import os
import signal
import time

import pytest

from bids_varaug.cli import run as app


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """Jobs that a shell started in the background, the tests among them, ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_and_its_workers(monkeypatch, capsys, number, code):
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(120,))
    worker.start()

    def interrupted(settings):
        os.kill(os.getpid(), number)
        time.sleep(60)  # the handler runs at the next instruction

    monkeypatch.setattr(app, "parse_settings", lambda argv: None)
    monkeypatch.setattr(app, "run", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    assert app.main([]) == code
    assert "pass the same -w" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    worker.join(30)
    assert worker.exitcode == -signal.SIGKILL
