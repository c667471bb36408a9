"""`lrface serve` and `lrface ui` as a user runs them: errors with names, and an end in good order."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from serving import form
from typer.testing import CliRunner

pytest.importorskip("fastapi")

from lrface.cli import app
from lrface.errors import LrfaceError, UsageError
from lrface.serve import _listen
from lrface.serve.limits import Refused, check_token, read_token

TOKEN = "correct-horse-battery-staple"


def refused(*arguments, code, **environment):
    done = CliRunner().invoke(app, list(arguments), env=environment)
    assert done.exit_code == code, (done.exit_code, done.stderr, done.exception)
    assert done.stdout == "" and done.stderr.startswith("error: ")
    return done.stderr


def test_errors_name_what_is_wrong(pooled_model, tmp_path):
    absent = str(tmp_path / "no.onnx")
    assert absent in refused("serve", absent, "--port", "0", code=1)
    assert "secret.txt" in refused("serve", absent, "--token-file", str(tmp_path / "secret.txt"), code=1)
    short = tmp_path / "token"
    short.write_text("short\n")
    assert "at least 16" in refused("serve", absent, "--token-file", str(short), code=2)
    assert "LRFACE_TOKEN" in refused("serve", absent, code=2, LRFACE_TOKEN="with spaces in between")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = refused("ui", str(pooled_model), "--port", port, code=1)
        assert port in message and "in use" in message
    message = refused("serve", str(pooled_model), "--host", "0.0.0.0", "--port", "0", code=2)
    assert "--token-file" in message and "--anyone" in message
    assert "no address" in refused("serve", str(pooled_model), "--host", "no such host", code=2)
    assert "65535" in refused("serve", str(pooled_model), "--port", "70000", code=2)
    assert "limit batch" in refused("serve", str(pooled_model), "--max-batch", "0", code=2)
    gallery = str(tmp_path / "people")
    message = refused("serve", str(pooled_model), "--port", "0", "--gallery", gallery, code=1)
    assert gallery in message


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "python_multipart", "prometheus_client"])
def test_a_missing_package_is_named_with_its_extra(package, pooled_model, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = refused("serve", str(pooled_model), code=1)
    assert package in message and "pip install 'lrface[serve]'" in message


def test_the_token_comes_from_a_file_or_the_environment(tmp_path):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert read_token(file, {}) == read_token(None, {"LRFACE_TOKEN": TOKEN}) == TOKEN
    assert read_token(None, {}) is None
    file.write_bytes(b"\xff" * 40)
    with pytest.raises(LrfaceError, match="not a text file"):
        read_token(file, {})
    with pytest.raises(LrfaceError, match="cannot be read"):
        read_token(tmp_path, {})


def test_only_the_bearer_of_the_token_passes():
    check_token(None, None)
    check_token(TOKEN, f"Bearer {TOKEN}")
    check_token(TOKEN, f"bearer  {TOKEN}")
    for wrong in (
        None,
        "",
        TOKEN,
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        "Bearer ",
        f"Basic {TOKEN}",
        "Bearer é",
    ):
        with pytest.raises(Refused) as error:
            check_token(TOKEN, wrong)
        assert error.value.status == 401


def test_addresses(tmp_path):
    with _listen("localhost", 0) as listening:
        assert listening.getsockname()[1] > 0
    with pytest.raises(UsageError, match="no address"):
        _listen("256.0.0.1", 0)
    with pytest.raises(LrfaceError, match="cannot serve on 192.0.2.1"):  # of documentation: no machine has it
        _listen("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("command", "sent"),
    [("serve", signal.SIGTERM), pytest.param("ui", signal.SIGINT, marks=pytest.mark.slow)],
)
def test_stopping_finishes_what_is_in_work(command, sent, pooled_model, face_files, tmp_path):
    """A question whose body is half sent when the signal comes is answered; then the process ends with 0."""
    (tmp_path / "token").write_text(TOKEN)
    arguments = [command, str(pooled_model), "--port", "0", "--json", "--token-file", str(tmp_path / "token")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "lrface.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        said = json.loads(line)
        assert said["pid"] == process.pid and said["url"].startswith("http://127.0.0.1:")
        address = said["url"].removeprefix("http://")
        connection = http.client.HTTPConnection(address, timeout=120)
        body, headers = form(("image", face_files[0]))
        connection.putrequest("POST", "/embed?kind=crop")
        headers |= {"Authorization": f"Bearer {TOKEN}", "Content-Length": str(len(body))}
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders(body[:100])
        time.sleep(0.5)  # it has arrived
        process.send_signal(sent)
        host, port = address.split(":")
        deadline = time.monotonic() + 60
        while True:  # nobody new is taken
            try:
                socket.create_connection((host, int(port)), timeout=5).close()
            except OSError:
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        connection.send(body[100:])
        answer = connection.getresponse()
        assert answer.status == 200 and len(json.loads(answer.read())["images"][0]["faces"]) == 1
        rest, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    assert rest == "" and "Traceback" not in errors and said["url"] in errors
    assert "POST /embed 200" in errors and "marianne" not in errors and TOKEN not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["token"]
