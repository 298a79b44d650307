"""Nothing is fetched: no template, no weights, no newest version."""

import socket

from bids_varaug.cli.run import main
from tests.workflows.conftest import describe, write_t1w


def test_run_opens_no_connection_and_leaves_templateflow_empty(
    small_ensemble, linear, tmp_path, monkeypatch
):
    tried = []

    def refuse(self, address):
        tried.append(address)
        raise OSError(f"no network in this test: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    home = tmp_path / "templateflow"
    home.mkdir()
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(home))
    write_t1w(describe(tmp_path / "bids"), "sub-01")
    arguments = ["-w", str(tmp_path / "work"), "--ensemble", str(small_ensemble), *linear]
    places = [str(tmp_path / "bids"), str(tmp_path / "out"), "participant"]
    assert main([*places, *arguments, "--members", "ieee", "seed"]) == 0
    assert tried == []
    assert list(home.iterdir()) == []
