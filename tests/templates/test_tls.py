"""TLS at the gateway, as real clients shake hands with it: the standard library, httpx, and curl for HTTP/2."""

import asyncio
import collections
import re
import shutil
import socket
import ssl
import subprocess

import httpx
import pytest

from testbed.shell import provide
from tests.templates.conftest import KEYS, PORT, ROUTE, TLS, TLS_PORT, article_fleet, running

HERE = f"https://localhost:{TLS_PORT}"


def with_tls(**fields):
    """The article's fleet behind TLS."""
    return article_fleet(entrance={"gateway_tls": {**TLS["gateway_tls"], **fields}})


async def ask(url, certificate, method="GET", **request):
    """Ask over TLS, trusting the certificate alone."""
    trusted = ssl.create_default_context(cafile=f"{certificate}/certificate.pem")
    async with httpx.AsyncClient(verify=trusted, trust_env=False, timeout=10) as http:
        return await http.request(method, url, **request)


def handshake(version, ciphers="ALL"):
    """Version and cipher that a client which knows these only agrees on with the gateway, None if on none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        with (
            socket.create_connection(("127.0.0.1", TLS_PORT), timeout=5) as plain,
            context.wrap_socket(plain) as secured,
        ):
            return secured.version(), secured.cipher()[0], secured.selected_alpn_protocol()
    except ssl.SSLError:
        return None


OLD = [(ssl.TLSVersion.TLSv1_1, "ALL")]
OLD += [(ssl.TLSVersion.TLSv1_2, cipher) for cipher in ("AES128-SHA", "AES256-GCM-SHA384", "ECDHE-RSA-AES128-SHA256")]
GOOD = ("ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-RSA-AES256-GCM-SHA384", "ECDHE-RSA-CHACHA20-POLY1305")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_only_what_is_safe_today_is_agreed_on(gateway, certificate):
    async def scenario():
        async with running(gateway, with_tls(), certificate=certificate):
            assert [handshake(version, ciphers) for version, ciphers in OLD] == [None] * len(OLD)
            for cipher in GOOD:
                assert handshake(ssl.TLSVersion.TLSv1_2, cipher) == ("TLSv1.2", cipher, "h2")
            assert handshake(ssl.TLSVersion.TLSv1_3)[0] == "TLSv1.3"

    asyncio.run(scenario())


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_these_clients_would_agree_on_less(gateway, certificate):
    """Else the test above could not fail."""
    gateway.write(with_tls(), certificate)
    text = gateway.configuration.read_text().replace("TLSv1.2 TLSv1.3;", "TLSv1.1 TLSv1.2;")
    gateway.configuration.write_text(re.sub("ssl_ciphers [^;]*;", "ssl_ciphers ALL:@SECLEVEL=0;", text))
    gateway.start()
    try:
        assert all(handshake(version, ciphers) for version, ciphers in OLD)
    finally:
        gateway.stop()


def test_what_is_served_in_the_clear_is_served_over_tls(gateway, certificate):
    async def scenario():
        async with running(gateway, with_tls(), certificate=certificate) as cluster:
            assert (await ask(f"{HERE}/health", certificate)).text == "healthy, agent not answering\n"
            await gateway.start_agent()
            assert "instances" in (await ask(f"{HERE}/cluster/status", certificate)).json()
            answer = await ask(f"{HERE}{ROUTE}generate", certificate, "POST", content=b"{}")
            assert answer.status_code == 200
            (gpu,) = [gpu for gpu in cluster.gpus.values() if gpu.started]
            assert gpu.headers["x-forwarded-proto"] == "https"

    asyncio.run(scenario())


def test_plain_http_is_sent_to_tls_with_its_method_and_its_body(gateway, certificate):
    async def scenario():
        async with running(gateway, with_tls(), certificate=certificate) as cluster:
            url = f"http://localhost:{PORT}{ROUTE}generate?voice=%E4%BD%A0"
            answer = await ask(url, certificate, "POST", content=b"{}")
            assert (answer.status_code, answer.headers["location"]) == (
                308,
                url.replace(f"http://localhost:{PORT}", HERE),
            )
            assert cluster.started == 0
            followed = await ask(url, certificate, "POST", content=b"{}", follow_redirects=True)
            assert (followed.status_code, followed.request.method) == (200, "POST")
            assert [gpu.bodies for gpu in cluster.gpus.values() if gpu.started] == [[2]]
            assert (await ask(f"http://localhost:{PORT}/_error/404", certificate)).status_code == 404

    asyncio.run(scenario())


def test_without_redirects_nobody_listens_for_plain_http(gateway, certificate):
    async def scenario():
        async with running(gateway, with_tls(redirect=False), certificate=certificate):
            with pytest.raises(httpx.ConnectError):
                await ask(f"http://localhost:{PORT}/health", certificate)
            mistaken = await ask(f"http://localhost:{TLS_PORT}/health", certificate)
            assert (mistaken.status_code, mistaken.json()["error"]["code"]) == (400, "bad_request")

    asyncio.run(scenario())


@pytest.mark.parametrize("seconds", [0, 86400])
def test_browsers_are_bound_to_tls_only_where_the_operator_says_so(gateway, certificate, seconds):
    async def scenario():
        fleet = article_fleet(client_limit=1, entrance={"gateway_tls": {**TLS["gateway_tls"], "hsts_seconds": seconds}})
        async with running(gateway, fleet, certificate=certificate):
            busy = [ask(f"{HERE}{ROUTE}generate", certificate, "POST", content=b"{}") for _ in range(2)]
            answers = [*await asyncio.gather(*busy), await ask(f"{HERE}/nowhere", certificate)]
            assert sorted(answer.status_code for answer in answers) == [200, 404, 503]
            for answer in answers:
                expected = [f"max-age={seconds}"] if seconds else []
                assert answer.headers.get_list("strict-transport-security") == expected
                assert len(answer.headers.get_list("x-request-id")) == 1
            plain = await ask(f"http://localhost:{PORT}/", certificate)
            assert "strict-transport-security" not in plain.headers

    asyncio.run(scenario())


def test_on_one_http2_connection_each_request_counts_by_itself(gateway, certificate):
    provide({"curl": "curl"})
    said = "%{http_version} %{http_code} %{num_connects}\\n"
    command = ["curl", "--silent", "--http2", "--cacert", f"{certificate}/certificate.pem", "--parallel"]
    command += ["--parallel-max", "20", "--data", "{}", "--write-out", said]
    urls = [word for number in range(20) for word in ("--output", "/dev/null", f"{HERE}{ROUTE}{number}")]

    async def scenario():
        async with running(gateway, with_tls(), certificate=certificate) as cluster:
            for gpu in cluster.gpus.values():
                gpu.seconds = 1
            asked = await asyncio.create_subprocess_exec(*command, *urls, stdout=subprocess.PIPE)
            lines = (await asked.communicate())[0].decode().splitlines()
            assert collections.Counter(line.split()[0] for line in lines) == {"2": 20}
            assert collections.Counter(line.split()[1] for line in lines) == {"200": 6, "503": 14}
            assert sum(int(line.split()[2]) for line in lines) == 1
            assert cluster.started == 6

    asyncio.run(scenario())


def test_another_certificate_is_taken_over_and_cuts_nobody(gateway, certificate, tmp_path):
    async def scenario():
        async with running(gateway, with_tls(), certificate=certificate) as cluster:
            for gpu in cluster.gpus.values():
                gpu.seconds = 1
            waiting = asyncio.create_task(ask(f"{HERE}{ROUTE}generate", certificate, "POST", content=b"{}"))
            while not cluster.running:
                await asyncio.sleep(0.01)
            other = tmp_path / "other"
            shutil.copytree(certificate, other)
            request = ["openssl", "req", "-x509", "-key", other / "key.pem", "-subj", "/CN=other", "-days", "1"]
            subprocess.run([*request, "-out", other / "certificate.pem"], check=True, capture_output=True)
            gateway.write(cluster.fleet, other)
            gateway.reload()
            before = (certificate / "certificate.pem").read_text()
            while ssl.get_server_certificate(("127.0.0.1", TLS_PORT)).strip() == before.strip():
                await asyncio.sleep(0.02)
            assert not waiting.done()
            assert (await waiting).status_code == 200

    asyncio.run(scenario())


def test_keys_and_tls_together(gateway, certificate):
    async def scenario():
        fleet = article_fleet(entrance={**TLS, "api_keys": KEYS})
        async with running(gateway, fleet, certificate=certificate) as cluster:
            answer = await ask(f"{HERE}{ROUTE}generate", certificate, "POST", content=b"{}")
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer realm="gpufleet"')
            assert cluster.started == 0

    asyncio.run(scenario())
