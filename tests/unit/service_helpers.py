"""Running the guard and the service under Gunicorn, and asking them over real sockets."""

import http.client
import json
import os
import socket
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

UNIT = Path(__file__).parent
PROJECT = UNIT.parent.parent
FROM_GATEWAY = {"X-Gpufleet-Instance": "cosyvoice2-gpu01-0"}


def free_port() -> int:
    """A TCP port of loopback that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def wait_for(condition, seconds=10):
    """Wait until `condition()` is true and return what it gave."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return value


class Server:
    """A guarded app under Gunicorn."""

    def __init__(self, process, port, log):
        self.process, self.port, self._log = process, port, log
        self.clients = []

    @property
    def log(self):
        return self._log.read_text()

    def connection(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def ask(self, method, path, body=None, headers=None):
        """One request on its own connection: (status, headers, body)."""
        connection = self.connection()
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def post(self, path, request_id="r"):
        return self.ask("POST", path, headers={"X-Request-ID": request_id})

    def send(self, request):
        """Send bytes on a new connection and return it; it is closed when the server ends, at the latest."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        self.clients.append(client)
        client.sendall(request)
        return client

    def begin(self, path, request_id="r", body=b"", length=None):
        """Send a POST and return its connection, so that the test can hang up when it likes."""
        head = {"Host": "x", "Content-Type": "application/json", "X-Request-ID": request_id}
        head["Content-Length"] = len(body) if length is None else length
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", ""]
        return self.send("\r\n".join(lines).encode() + body)

    def status(self):
        return json.loads(self.ask("GET", "/_slot_guard/status")[2])

    def in_flight(self):
        return self.status()["in_flight"]

    def is_up(self):
        try:
            return self.ask("GET", "/_slot_guard/live")[0] == 200
        except OSError:
            assert self.process.poll() is None, self.log
            return False

    def is_ready(self):
        return self.is_up() and self.ask("GET", "/_slot_guard/ready")[0] == 200


@contextmanager
def serving(tmp_path, app, *flags, wait=Server.is_ready, **environment):
    """Run `app` guarded under Gunicorn as a GPU host does; `wait` says what to wait for."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "server.log"
    path = [PROJECT / "service/guard", PROJECT / "service/tts", UNIT / "fixtures"]
    arguments = ["--worker-class", "asgi", "--workers", "1", "--bind", f"127.0.0.1:{port}", "--no-control-socket"]
    arguments += ["--asgi-disconnect-grace-period", "0", "--graceful-timeout", "10", *flags, "slot_guard.asgi:app"]
    variables = {"PYTHONPATH": os.pathsep.join(map(str, path)), "SLOT_GUARD_APP": app}
    variables |= {"SLOT_GUARD_STATE": str(tmp_path), **environment}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", *arguments],
            stdout=output,
            stderr=output,
            cwd=tmp_path,
            env={**os.environ, **variables},
        )
    server = Server(process, port, log)
    try:
        if wait:
            wait_for(lambda: wait(server))
        yield server
    finally:
        for client in server.clients:
            client.close()
        process.terminate()
        process.wait(20)


def read_until(client, text):
    """Read from a connection until `text` has come."""
    received = b""
    while text not in received:
        piece = client.recv(4096)
        assert piece, received
        received += piece
    return received


def hang_up(client):
    """Reset a connection."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def read_ledger(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def running(path):
    """Inferences that the ledger at `path` has seen start and not end."""
    events = [line["event"] for line in read_ledger(path)]
    return events.count("start") - events.count("end")
