"""Nasty bytes through the rendered nginx to a real Gunicorn with the guard: at most one request of them arrives."""

import contextlib
import json
import socket

import httpx
import pytest

from tests.templates.conftest import PORT, ROUTE, Gateway, article_fleet, short_folder
from tests.unit.service_helpers import serving

HERE = f"{ROUTE}nasty".encode()
AFTER, FRESH = f"{ROUTE}after".encode(), f"{ROUTE}fresh".encode()
SMUGGLED = b"GET %ssmuggled HTTP/1.1\r\nHost: x\r\n\r\n" % ROUTE.encode()
HIDDEN = b"0\r\n\r\n" + SMUGGLED
"""A body that ends an empty chunked one, so that who reads chunks finds a second request behind it."""
QUIET_SECONDS = 0.15


def get(target=HERE, *headers, version=b"HTTP/1.1"):
    return b"\r\n".join([b"GET %s %s" % (target, version), b"Host: x", *headers, b"", b""])


def last(target):
    return get(target, b"Connection: close")


def post(*headers, body=HIDDEN):
    return b"\r\n".join([b"POST %s HTTP/1.1" % HERE, b"Host: x", *headers, b"", body])


def chunked(body):
    return post(b"Transfer-Encoding: chunked", body=body)


LENGTH = b"Content-Length: %d" % len(HIDDEN)
CHUNK = b"%x\r\n%s\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)

#: By name: how many requests arrive, and the bytes.
CORPUS = {
    "CL.TE": (0, post(LENGTH, b"Transfer-Encoding: chunked")),
    "TE.CL": (0, post(b"Transfer-Encoding: chunked", b"Content-Length: 4", body=CHUNK)),
    "CL.TE in capitals": (0, post(LENGTH, b"TRANSFER-ENCODING: CHUNKED")),
    "TE of an unknown kind": (0, post(LENGTH, b"Transfer-Encoding: xchunked")),
    "TE identity": (0, post(LENGTH, b"Transfer-Encoding: identity")),
    "TE list": (0, post(LENGTH, b"Transfer-Encoding: chunked, identity")),
    "TE list that ends with chunked": (0, post(LENGTH, b"Transfer-Encoding: gzip, chunked")),
    "TE twice": (0, post(LENGTH, b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity")),
    "TE twice the same": (0, post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked")),
    "TE with a space before the colon": (0, post(LENGTH, b"Transfer-Encoding : chunked")),
    "TE with a tab": (0, post(LENGTH, b"Transfer-Encoding:\tchunked")),
    "TE with a vertical tab": (0, post(LENGTH, b"Transfer-Encoding: \x0bchunked")),
    "TE quoted": (0, post(LENGTH, b'Transfer-Encoding: "chunked"')),
    "TE folded": (0, post(LENGTH, b"Transfer-Encoding:", b" chunked")),
    "TE behind a fold": (0, post(LENGTH, b"X: y", b" Transfer-Encoding: chunked")),
    "TE behind a bare LF": (0, post(LENGTH, b"X: y\nTransfer-Encoding: chunked")),
    "TE behind a bare CR": (0, post(LENGTH, b"X: y\rTransfer-Encoding: chunked")),
    "TE with an underscore": (1, post(LENGTH, b"Transfer_Encoding: chunked")),
    "TE under HTTP/1.0": (0, get(HERE, b"Transfer-Encoding: chunked", version=b"HTTP/1.0") + HIDDEN),
    "CL twice, different": (0, post(b"Content-Length: 5", LENGTH)),
    "CL twice, the same": (0, post(LENGTH, LENGTH)),
    "CL list": (0, post(b"Content-Length: 5, 5")),
    "CL with +": (0, post(b"Content-Length: +5")),
    "CL with -": (0, post(b"Content-Length: -5")),
    "CL with a space inside": (0, post(b"Content-Length: 5 0")),
    "CL with a space before the colon": (0, post(b"Content-Length : 5")),
    "CL with a space behind": (1, post(LENGTH + b" ")),
    "CL hexadecimal": (0, post(b"Content-Length: 0x5")),
    "CL with an underscore": (0, post(b"Content-Length: 5_0")),
    "CL in other digits": (0, post(b"Content-Length: \xd9\xa5")),
    "CL beyond 64 bits": (0, post(b"Content-Length: 18446744073709551621")),
    "CL empty": (0, post(b"Content-Length:")),
    "chunk with 0x": (0, chunked(b"0x5\r\nhello\r\n0\r\n\r\n")),
    "chunk with +": (0, chunked(b"+5\r\nhello\r\n0\r\n\r\n")),
    "chunk with -": (0, chunked(b"-5\r\nhello\r\n0\r\n\r\n")),
    "chunk beyond 64 bits": (0, chunked(b"FFFFFFFFFFFFFFFFF\r\nhello\r\n0\r\n\r\n")),
    "chunk that wraps 64 bits": (0, chunked(b"10000000000000005\r\nhello\r\n0\r\n\r\n")),
    "chunk with zeros": (1, chunked(b"0000000005\r\nhello\r\n0\r\n\r\n")),
    "chunk with an extension": (1, chunked(b"5;a=b\r\nhello\r\n0\r\n\r\n")),
    "chunk with a request in its extension": (0, chunked(b"5;" + SMUGGLED[:-4] + b"\r\nhello\r\n0\r\n\r\n")),
    "chunk longer than said": (0, chunked(b"5\r\nhello world\r\n0\r\n\r\n")),
    "chunk without its end": (0, chunked(b"5\r\nhello0\r\n\r\n")),
    "chunk that holds a request": (1, chunked(CHUNK)),
    "bare LF everywhere": (1, get().replace(b"\r\n", b"\n")),
    "bare CR everywhere": (0, get().replace(b"\r\n", b"\r")),
    "space before a colon": (0, get(HERE, b"X : y")),
    "header without a colon": (1, get(HERE, b"X")),
    "NUL in a name": (0, get(HERE, b"X\0Y: z")),
    "NUL in a value": (0, get(HERE, b"X: y\0z")),
    "NUL in the path": (0, get(HERE + b"\0")),
    "encoded NUL in the path": (0, get(HERE + b"%00")),
    "encoded line in the path": (1, get(HERE + b"%0d%0aX:%20y%0d%0a%0d%0a" + SMUGGLED.split(b" ")[1])),
    "encoded line in the query": (1, get(HERE + b"?%0d%0a%0d%0aGET%20" + SMUGGLED.split(b" ")[1])),
    "space in the path": (0, get(HERE + b" smuggled")),
    "no Host": (0, b"GET %s HTTP/1.1\r\n\r\n" % HERE),
    "Host twice": (0, get(HERE, b"Host: y")),
    "Host with a path": (0, get().replace(b"Host: x", b"Host: x/y")),
    "absolute form, another Host": (1, get(b"http://elsewhere" + HERE)),
    "absolute form, another scheme": (1, get(b"gopher://elsewhere" + HERE)),
    "HTTP/0.9": (1, b"GET %s\r\n" % HERE),
    "HTTP/0.9 POST": (0, b"POST %s\r\n" % HERE),
    "HTTP/1.2": (1, get(HERE, version=b"HTTP/1.2")),
    "HTTP/2.0": (0, get(HERE, version=b"HTTP/2.0")),
    "HTTP/1.11": (1, get(HERE, version=b"HTTP/1.11")),
    "http in small letters": (0, get(HERE, version=b"http/1.1")),
    "HTTP/2 preface": (0, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "h2c upgrade": (
        1,
        get(HERE, b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__"),
    ),
    "CONNECT": (0, get(b"127.0.0.1:22").replace(b"GET", b"CONNECT", 1)),
    "TRACE": (0, get().replace(b"GET", b"TRACE", 1)),
    "OPTIONS *": (0, get(b"*").replace(b"GET", b"OPTIONS", 1)),
    "method of no known kind": (1, get().replace(b"GET", b"BREW", 1)),
    "method in small letters": (0, get().replace(b"GET", b"get", 1)),
    "Expect of an unknown kind": (1, post(b"Content-Length: 2", b"Expect: 200-ok", body=b"{}")),
    "GET with a body": (1, get(HERE, LENGTH) + HIDDEN),
    "hop-by-hop names of ours": (1, get(HERE, b"Connection: close, X-Gpufleet-Instance, X-Real-IP")),
    "names of ours, forged": (
        1,
        get(HERE, b"X-Gpufleet-Instance: me", b"X-Real-IP: 9.9.9.9", b"X-Forwarded-For: 9.9.9.9"),
    ),
    "names of ours with underscores": (1, get(HERE, b"X_Gpufleet_Instance: me", b"X_Real_IP: 9.9.9.9")),
    "nothing but line ends": (0, b"\r\n\r\n\r\n"),
    "TLS": (0, bytes.fromhex("16030100510100004d0303") + bytes(70)),
}


class Served:
    """A gateway before one guarded Gunicorn that records what arrives."""

    def __init__(self, instance, guard, record):
        self.instance, self.guard, self._record = instance, guard, record

    def recorded(self):
        """What arrived since the last call."""
        lines = self._record.read_text().splitlines() if self._record.exists() else []
        self._record.write_text("")
        return [json.loads(line) for line in lines]

    @staticmethod
    def say(request):
        """Send bytes on a connection of their own; return what is answered until it is closed or quiet."""
        received = b""
        with socket.create_connection(("127.0.0.1", PORT), timeout=QUIET_SECONDS) as client:
            client.sendall(request)
            with contextlib.suppress(TimeoutError, ConnectionError):
                while piece := client.recv(65536):
                    received += piece
        return received


@contextlib.contextmanager
def recording(nginx_program, folder, route=ROUTE, certificate=None, **fleet):
    """A gateway before a recorder, for the length of a block."""
    record = folder / "record"
    guarded = serving(folder, "recorder:app", RECORDER_FILE=str(record))
    with short_folder() as below, guarded as server:
        gateway = Gateway(nginx_program, below)
        derived = article_fleet(hosts=1, gpu_count=1, client_limit=2, route=route, **fleet)
        (instance,) = derived["instances"]
        instance |= {"address": "127.0.0.1", "port": server.port}
        gateway.write(derived, certificate)
        gateway.start()
        try:
            yield Served(instance["id"], f"http://127.0.0.1:{server.port}", record)
        finally:
            gateway.stop()


@pytest.fixture(scope="module", params=[ROUTE], ids=["route"])
def served(request, nginx_program, tmp_path_factory):
    with recording(nginx_program, tmp_path_factory.mktemp("gunicorn"), request.param) as ready:
        yield ready


@pytest.mark.parametrize("name", CORPUS)
def test_at_most_one_request_arrives_and_never_a_hidden_one(served, name):
    arrives, request = CORPUS[name]
    served.recorded()
    served.say(request + last(AFTER))
    assert served.say(last(FRESH)).endswith(b'{"path": "%s"}' % FRESH), "the next client has its own answer"
    assert_nothing_hidden_arrived(served, arrives)


def assert_nothing_hidden_arrived(served, arrives):
    """Of the bytes in question so many requests, besides the next client's and at most one more of their sender's."""
    seen = served.recorded()
    paths = [one["path"].encode() for one in seen]
    assert SMUGGLED.split(b" ")[1] not in paths
    assert paths.count(FRESH) == 1
    assert paths.count(AFTER) <= 1
    assert len(set(paths) - {FRESH, AFTER}) == len(paths) - paths.count(FRESH) - paths.count(AFTER) == arrives
    for one in seen:
        told = dict(one["headers"])
        assert len(told) == len(one["headers"]), "no header twice"
        assert told["x-gpufleet-instance"] == served.instance
        assert told["x-real-ip"] == told["x-forwarded-for"] == "127.0.0.1"
        assert not {"transfer-encoding", "upgrade", "te", "keep-alive"} & told.keys()


@pytest.mark.parametrize("served", [ROUTE, "/"], ids=["route", "root"], indirect=True)
@pytest.mark.parametrize(
    "target",
    [
        "/_slot_guard/status",
        "/%5fslot_guard/status",
        "/%5Fslot%5Fguard/%73tatus",
        "/_slot_guard%2fstatus",
        "/%255fslot_guard/status",
        "//_slot_guard/status",
        "///_slot_guard//status",
        "/./_slot_guard/status",
        "/x/../_slot_guard/status",
        "/x/%2e%2e/_slot_guard/status",
        "/x/..%2f_slot_guard/status",
        "/_slot_guard/status?x",
        "/_slot_guard/status#x",
        "/_slot_guard;x/status",
        "/_slot_guard\\status",
        "http://127.0.0.1/_slot_guard/status",
        "http:///_slot_guard/status",
        "HTTP://x//_slot_guard/status",
        "_slot_guard/status",
        f"{ROUTE}../../../_slot_guard/status",
        f"{ROUTE}%2e%2e/%2e%2e/%2e%2e/_slot_guard/status",
        f"{ROUTE}..%2f..%2f..%2f_slot_guard/status",
        f"{ROUTE}/_slot_guard/status",
        f"{ROUTE}_slot_guard/status",
        f"/_slot_guard/..{ROUTE}x",
        f"/_slot_guard/status/../..{ROUTE}x",
        f"/_slot_guard/status%2f..%2f..{ROUTE}x",
        f"/_slot_guard/status?/..{ROUTE}x",
    ],
)
def test_no_client_asks_the_guard(served, target):
    for question in ("status", "metrics"):
        request = last(target.replace("status", question).encode())
        forged = request.replace(
            b"Connection: close", b"X-Gpufleet-Instance:\r\nConnection: close, X-Gpufleet-Instance"
        )
        for answer in (served.say(request), served.say(forged)):
            assert answer and b"in_flight" not in answer


def test_the_guard_itself_would_answer(served):
    """What is kept from clients is there: the test above could fail."""
    for question in ("status", "metrics"):
        assert b"in_flight" in httpx.get(f"{served.guard}/_slot_guard/{question}", trust_env=False).content
