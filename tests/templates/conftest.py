"""nginx with the rendered configuration on loopback, in front of simulated GPUs."""

import asyncio
import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from ansible_collections.gpufleet.core.plugins.module_utils.entrance import hash_of
from ansible_collections.gpufleet.core.plugins.module_utils.fleet import derive

from testbed.shell import unpack
from tests.certificate import self_signed
from tests.templates.gpu import SimulatedGpu
from tests.templates.render import PROJECT, files_made, render
from tools.apikey import new_key


def reserve_number() -> tuple[int, socket.socket]:
    """A number from 16 to 215 that no other process of these tests has while the socket is open."""
    for number in range(16, 216):
        with contextlib.suppress(OSError):
            return number, socket.create_server((f"127.{number}.255.254", 20000))
    raise RuntimeError("other tests have all numbers")


# Several test processes, of this checkout and of others, run on one machine at a time: each has a loopback network and
# ports of its own, below those that the kernel gives to whoever asks for any.
NUMBER, _reservation = reserve_number()
atexit.register(_reservation.close)
NETWORK = f"127.{NUMBER}"
PORT, TLS_PORT = 20000 + NUMBER, 20500 + NUMBER
ROUTE = "/AIVoice/TTS/CosyVoice2/"
TLS = {"gateway_tls": {"certificate": "given", "key": "given", "port": TLS_PORT}}
ALICE, BOB, CAROL = (new_key(label) for label in ("alice", "bob", "carol"))
KEYS = {
    "alice": {"hashes": [hash_of(ALICE)], "in_flight": 4},
    "bob": {"hashes": [hash_of(BOB)], "in_flight": 4},
    "carol": {"hashes": [hash_of(CAROL)]},
}


@pytest.fixture(scope="session")
def nginx_program() -> str:
    """The distribution's nginx: the installed one, else unpacked from its package without installing a service."""
    installed = shutil.which("nginx")
    if installed:
        return installed
    folder = PROJECT / ".cache/nginx"
    unpack(folder, "nginx")
    return str(folder / "usr/sbin/nginx")


def article_fleet(
    hosts: int = 3,
    gpu_count: int = 2,
    client_limit: int = 6,
    entrance: Mapping[str, Any] | None = None,
    others: Mapping[str, Any] | None = None,
    **service: Any,
) -> dict[str, Any]:
    """The article's fleet on loopback: `service` are fields of its service, `others` more services by name.

    `entrance` are variables of the gateway: gateway_tls, api_keys.
    """
    names = [f"gpu{number:02}" for number in range(1, hosts + 1)]
    hostvars = {
        name: {"gpu_count": gpu_count, "ansible_host": f"{NETWORK}.{number // 250}.{1 + number % 250}"}
        for number, name in enumerate(names)
    }
    fields = {"route": ROUTE, "app": "app:app", "code": {"source": "."}, "conda_env": "tts", **service}
    services = {"cosyvoice2": {**fields, "client_limit": client_limit}, **(others or {})}
    groups = {"gpu_servers": names, "gateways": ["gateway"]}
    conda_envs = {"tts": {"lock": "."}}
    gateway = {"ansible_host": "127.0.0.1", **(entrance or {})}
    fleet = derive(services, groups, {**hostvars, "gateway": gateway}, conda_envs=conda_envs, port=PORT)
    assert fleet["faults"] == []
    return fleet


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate for localhost and its key."""
    return self_signed(tmp_path_factory.mktemp("tls"), "localhost")


class Gateway:
    """An nginx process that serves the rendered configuration below a folder of its own."""

    def __init__(self, program: str, folder: Path) -> None:
        self.program, self.folder = program, folder
        self.configuration = folder / "nginx.conf"
        self.agent_configuration = folder / "agent.json"
        self.agent: subprocess.Popen[str] | None = None
        run = ("run/gpufleet-gateway/zones", "run/gpufleet-agent/down")
        for name in (*run, "var/lib/gpufleet-gateway/drain", "var/lib/nginx", "var/log/nginx"):
            (folder / name).mkdir(parents=True)
        shutil.copytree(PROJECT / "service/agent", folder / "opt/gpufleet/fleet-agent/current")

    def log(self, name: str = "cosyvoice2_access.log") -> list[str]:
        """The lines of a log, by default of the service's access log."""
        return (self.folder / "var/log/nginx" / name).read_text().splitlines()

    async def logged(self, lines: int = 1, name: str = "cosyvoice2_access.log") -> list[str]:
        """Likewise, when there are so many: nginx writes them after the answers."""
        async with asyncio.timeout(2):
            while len(self.log(name)) < lines:
                await asyncio.sleep(0.01)
        return self.log(name)

    def write(self, fleet: dict[str, Any], certificate: Path | None = None, **variables: Any) -> None:
        """Render the configurations of nginx and of the agent for a fleet, and keep its secrets in a folder."""
        secrets = self.folder / "secrets"
        shutil.rmtree(secrets, ignore_errors=True)
        secrets.mkdir()
        for file in certificate.iterdir() if certificate else ():
            shutil.copy(file, secrets)
        if fleet["api_keys"]:
            (secrets / "api_keys.conf").write_text(render("gateway", "api_keys.conf.j2", fleet))
        text = self._moved(render("gateway", "nginx.conf.j2", fleet, **variables)).replace("@SECRETS@", str(secrets))
        for path, content in files_made(fleet).items():
            Path(self._moved(path)).write_text(content)
        self._port = fleet["ports"][-1]
        self.agent_configuration.write_text(self._moved(render("agent", "agent.json.j2", fleet)))
        temporary = "".join(
            f"    {kind}_temp_path {self.folder}/var/lib/nginx/{kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "scgi", "uwsgi")
        )
        self.configuration.write_text(text.replace("http {\n", "http {\n" + temporary, 1))

    def _moved(self, text: str) -> str:
        """Move absolute paths below the folder."""
        for path in ("/run/", "/var/log/nginx", "/var/lib/gpufleet-gateway", "/opt/gpufleet"):
            text = text.replace(path, f"{self.folder}{path}")
        return text

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Call nginx on the configuration."""
        return subprocess.run([*self._call, *arguments], capture_output=True, text=True)

    @property
    def _call(self) -> list[str]:
        return [self.program, "-e", f"{self.folder}/var/log/nginx/error.log", "-c", str(self.configuration)]

    def start(self) -> None:
        """Start nginx and wait until it serves."""
        self._process = subprocess.Popen([*self._call, "-g", "daemon off;"], stderr=subprocess.PIPE, text=True)
        while not self._listens():
            assert self._process.poll() is None, self._process.communicate()[1]
            time.sleep(0.01)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    async def start_agent(self) -> None:
        """Start the agent and wait until it has made its first pass."""
        command = [sys.executable, "-m", "fleet_agent", "--config", str(self.agent_configuration)]
        with (self.folder / "agent.log").open("a") as log:
            self.agent = subprocess.Popen(command, cwd=PROJECT / "service/agent", stderr=log, text=True)
        socket_path = self.folder / "run/gpufleet-agent/http.sock"
        while not socket_path.exists():
            assert self.agent.poll() is None, (self.folder / "agent.log").read_text()
            await asyncio.sleep(0.01)

    @contextlib.contextmanager
    def renewed(self) -> Iterator[None]:
        """Have the counts renewed when a worker dies, for the length of a block."""
        files = {"--log": "var/log/nginx/error.log", "--zones": "run/gpufleet-gateway/zones"}
        files["--pid-file"] = "run/nginx.pid"
        options = [word for option, file in files.items() for word in (option, str(self.folder / file))]
        program = subprocess.Popen(
            [sys.executable, "-m", "fleet_agent.renewal", *options], cwd=PROJECT / "service/agent"
        )
        try:
            yield
        finally:
            program.kill()
            program.wait()

    def kill_workers(self) -> None:
        """Kill all workers as a crash would."""
        pid = self._process.pid
        for worker in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            os.kill(int(worker), signal.SIGKILL)

    def kill_agent(self) -> None:
        """Kill the agent, where it runs, as a fault would."""
        if self.agent is not None:
            self.agent.kill()
            self.agent.wait()
            self.agent = None

    @property
    def flagged(self) -> set[str]:
        """Instances that the agent keeps out."""
        return {path.name for path in (self.folder / "run/gpufleet-agent/down").iterdir()}

    def reload(self) -> None:
        """Let nginx take the configuration over again."""
        self._process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        """Stop nginx and wait until it is gone."""
        self._process.terminate()
        self._process.communicate(timeout=10)

    def drain(self, instance: str) -> Path:
        """Raise an instance's drain flag and return its path."""
        flag = self.folder / "var/lib/gpufleet-gateway/drain" / instance
        flag.touch()
        return flag


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path, because a socket's has 107 characters at most; nginx's workers can walk it."""
    with short_folder() as path:
        yield path


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gw-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def gateway(nginx_program: str, folder: Path) -> Gateway:
    return Gateway(nginx_program, folder)


class Cluster:
    """A running gateway and its simulated GPUs."""

    def __init__(self, gateway: Gateway, fleet: dict[str, Any]) -> None:
        self.gateway, self.fleet = gateway, fleet
        self.gpus = {i["id"]: SimulatedGpu(i["address"], i["port"]) for i in fleet["instances"]}

    @property
    def peak(self) -> int:
        """Most requests that ever ran on one GPU at a time."""
        return max(gpu.peak for gpu in self.gpus.values())

    @property
    def running(self) -> int:
        """Requests that the GPUs work on now."""
        return sum(gpu.running for gpu in self.gpus.values())

    @property
    def started(self) -> int:
        """Requests that any GPU began to work on."""
        return sum(gpu.started for gpu in self.gpus.values())

    async def post(self, client: str = "127.0.0.1", path: str = "generate", timeout: float = 20, **request: Any) -> Any:
        """Send one request from a client address; return the answer, or None after a hang-up by ``timeout``."""
        # Without TLS; reading the system's certificates for each client would take longer than everything else.
        transport = httpx.AsyncHTTPTransport(local_address=client, verify=False)
        async with httpx.AsyncClient(transport=transport, timeout=timeout, trust_env=False) as http:
            with contextlib.suppress(httpx.ReadTimeout):
                return await http.post(f"http://127.0.0.1:{PORT}{ROUTE}{path}", **{"content": b"{}", **request})
        return None

    async def ask(self, path: str, client: str = "127.0.0.1") -> httpx.Response:
        """Ask the gateway itself."""
        transport = httpx.AsyncHTTPTransport(local_address=client, verify=False)
        async with httpx.AsyncClient(transport=transport, timeout=20, trust_env=False) as http:
            return await http.get(f"http://127.0.0.1:{PORT}{path}")

    async def burst(self, count: int, clients: int = 4, **request: Any) -> list[Any]:
        """Send requests at once from several client addresses."""
        posts = [self.post(client=f"127.0.0.{10 + number % clients}", **request) for number in range(count)]
        return list(await asyncio.gather(*posts))


@contextlib.asynccontextmanager
async def running(gateway: Gateway, fleet: dict[str, Any], **variables: Any) -> AsyncIterator[Cluster]:
    """Run a gateway and its GPUs for the length of a block."""
    cluster = Cluster(gateway, fleet)
    gateway.write(fleet, **variables)
    async with contextlib.AsyncExitStack() as stack:
        for gpu in cluster.gpus.values():
            await gpu.start()
            stack.push_async_callback(gpu.stop)
        gateway.start()
        stack.callback(gateway.stop)
        stack.callback(gateway.kill_agent)
        yield cluster
