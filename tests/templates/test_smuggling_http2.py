"""Nasty frames of HTTP/2, whose headers may hold any byte, through the rendered nginx, which writes HTTP/1.1 inside."""

import contextlib
import socket
import ssl
import struct

import pytest

from tests.templates.conftest import TLS, TLS_PORT
from tests.templates.test_smuggling import (
    AFTER,
    CHUNK,
    FRESH,
    HERE,
    HIDDEN,
    QUIET_SECONDS,
    SMUGGLED,
    assert_nothing_hidden_arrived,
    recording,
)

DATA, HEADERS, SETTINGS = 0, 1, 4
END_STREAM, END_HEADERS = 1, 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LENGTH = (b"content-length", b"%d" % len(HIDDEN))


def frame(kind, flags, stream, payload):
    """RFC 9113, 4.1."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def text(value):
    """A string of RFC 7541, 5.2, not compressed."""
    return (bytes([len(value)]) if len(value) < 127 else b"\x7f" + varint(len(value) - 127)) + value


def varint(number):
    """What RFC 7541, 5.1 has behind a full prefix."""
    return bytes([number]) if number < 128 else bytes([number % 128 + 128]) + varint(number // 128)


def ask(*fields, stream=1, body=None, **pseudo):
    """A request: its pseudo-headers, other fields and body, just as they are given."""
    given = {
        "method": b"GET" if body is None else b"POST",
        "scheme": b"https",
        "path": HERE,
        "authority": b"x",
        **pseudo,
    }
    every = [(f":{name}".encode(), value) for name, value in given.items() if value is not None] + list(fields)
    block = b"".join(b"\0" + text(name) + text(value) for name, value in every)
    head = frame(HEADERS, END_HEADERS | (END_STREAM if body is None else 0), stream, block)
    return head if body is None else head + frame(DATA, END_STREAM, stream, body)


def say(*requests):
    """Send frames on a connection of their own; return what is answered until it is closed or quiet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    received = b""
    with socket.create_connection(("127.0.0.1", TLS_PORT), timeout=5) as plain, context.wrap_socket(plain) as client:
        assert client.selected_alpn_protocol() == "h2"
        client.sendall(PREFACE + frame(SETTINGS, 0, 0, b"") + b"".join(requests))
        client.settimeout(QUIET_SECONDS)
        with contextlib.suppress(TimeoutError, ConnectionError, ssl.SSLError):
            while piece := client.recv(65536):
                received += piece
    return received


BREAK = b"y\r\nX: z\r\n\r\n" + SMUGGLED
#: By name: how many requests arrive, and the frames.
CORPUS = {
    "nothing nasty": (1, ask()),
    "body that holds a request": (1, ask(LENGTH, body=HIDDEN)),
    "body of no said length": (1, ask(body=HIDDEN)),
    "body longer than said": (0, ask((b"content-length", b"4"), body=HIDDEN)),
    "body shorter than said": (0, ask((b"content-length", b"400"), body=HIDDEN)),
    "CL 0 with a body": (0, ask((b"content-length", b"0"), body=HIDDEN)),
    "CL twice, different": (0, ask(LENGTH, (b"content-length", b"5"), body=HIDDEN)),
    "CL with +": (0, ask((b"content-length", b"+5"), body=b"hello")),
    "TE beside CL": (0, ask(LENGTH, (b"transfer-encoding", b"chunked"), body=HIDDEN)),
    "TE alone": (1, ask((b"transfer-encoding", b"chunked"), body=CHUNK)),
    "line end in a value": (0, ask((b"x", BREAK))),
    "LF in a value": (0, ask((b"x", BREAK.replace(b"\r", b"")))),
    "CR in a value": (0, ask((b"x", b"y\rX: z"))),
    "NUL in a value": (0, ask((b"x", b"y\0z"))),
    "line end in a name": (0, ask((b"x: y\r\nz", b"z"))),
    "colon in a name": (0, ask((b"x: y", b"z"))),
    "TE in a name": (0, ask((b"transfer-encoding: chunked", b""), LENGTH, body=HIDDEN)),
    "capitals in a name": (0, ask((b"Transfer-Encoding", b"chunked"), LENGTH, body=HIDDEN)),
    "space in a name": (0, ask((b"x ", b"z"))),
    "empty name": (0, ask((b"", b"z"))),
    "line end in the path": (0, ask(path=HERE + b" HTTP/1.1\r\nHost: x\r\n\r\n" + SMUGGLED)),
    "space in the path": (0, ask(path=HERE + b" HTTP/1.1")),
    "path without a slash": (0, ask(path=HERE[1:])),
    "absolute path": (0, ask(path=b"http://elsewhere" + HERE)),
    "empty path": (0, ask(path=b"")),
    "no path": (0, ask(path=None)),
    "path twice": (0, ask((b":path", HERE))),
    "path behind a field": (1, ask((b"x", b"y"), (b":path", HERE), path=None)),
    "line end in the method": (0, ask(method=b"GET " + HERE + b" HTTP/1.1\r\nX: y")),
    "space in the method": (0, ask(method=b"GET /")),
    "method in small letters": (0, ask(method=b"get")),
    "CONNECT": (0, ask(method=b"CONNECT")),
    "line end in the authority": (0, ask(authority=b"x\r\nX: y")),
    "path in the authority": (0, ask(authority=b"x/y")),
    "no authority and no Host": (0, ask(authority=None)),
    "authority and another Host": (0, ask((b"host", b"elsewhere"))),
    "line end in the scheme": (0, ask(scheme=b"https\r\nX: y")),
    "unknown pseudo-header": (0, ask((b":x", b"y"))),
    "connection": (1, ask((b"connection", b"x-real-ip, x-gpufleet-instance"))),
    "upgrade": (1, ask((b"upgrade", b"websocket"), (b"connection", b"upgrade"))),
    "names of ours, forged": (
        1,
        ask((b"x-gpufleet-instance", b"me"), (b"x-real-ip", b"9.9.9.9"), (b"x-forwarded-for", b"9.9.9.9")),
    ),
}


@pytest.fixture(scope="module")
def served(nginx_program, certificate, tmp_path_factory):
    with recording(nginx_program, tmp_path_factory.mktemp("gunicorn"), certificate=certificate, entrance=TLS) as ready:
        yield ready


@pytest.mark.parametrize("name", CORPUS)
def test_at_most_one_request_arrives_and_never_a_hidden_one(served, name):
    arrives, frames = CORPUS[name]
    served.recorded()
    say(frames, ask(path=AFTER, stream=3))
    assert b'{"path": "%s"}' % FRESH in say(ask(path=FRESH)), "the next client has its own answer"
    assert_nothing_hidden_arrived(served, arrives)


@pytest.mark.parametrize("path", [b"/_slot_guard/status", b"/x/../_slot_guard/status", b"//_slot_guard/status"])
def test_no_client_asks_the_guard(served, path):
    assert b"in_flight" not in say(ask(path=path))
