"""Connections that dawdle: no head, half a head, an answer that nobody reads, too many at once."""

import asyncio
import contextlib
import socket
import threading

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")

import uvicorn

from airl_fast.serving.connections import protocol

WAIT = 60  # seconds until a test gives up; the server's own limit is a fraction of one


@contextlib.contextmanager
def listening(app, *, seconds=0.3, most=512):
    """A server of the application on a free port of its own thread."""
    config = uvicorn.Config(
        app, http=protocol(seconds=seconds, most=most), ws="none", log_level="critical",
        lifespan="off",
    )  # fmt: skip
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(WAIT)
            assert not thread.is_alive()


async def hello(scope, receive, send):
    await receive()
    await send({"type": "http.response.start", "status": 200,
                "headers": [(b"content-length", b"2")]})  # fmt: skip
    await send({"type": "http.response.body", "body": b"ok"})


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=WAIT)


def ask(connection):
    """Send a request and read its answer to the end."""
    connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    said = b""
    while not said.endswith(b"ok"):
        part = connection.recv(4096)
        assert part, said
        said += part
    assert said.startswith(b"HTTP/1.1 200")


def is_closed(connection):
    """Whether the other side ends the connection, in time, and what it said before."""
    said = b""
    try:
        while part := connection.recv(4096):
            said += part
    except ConnectionError:
        return True, said
    return True, said


@pytest.mark.parametrize("begun", [b"", b"P", b"POST /score HTTP/1.1\r\nHost: x\r\nA: "])
def test_a_head_that_does_not_come_ends_the_connection(begun):
    with listening(hello) as port, connect(port) as connection:
        connection.sendall(begun)
        assert is_closed(connection) == (True, b"")


def test_the_head_of_a_second_request_has_the_same_limit():
    with listening(hello) as port, connect(port) as connection:
        ask(connection)
        connection.sendall(b"GET / HT")
        closed, _ = is_closed(connection)
        assert closed


def test_a_request_that_takes_its_time_once_it_is_there_is_answered():
    async def slow(scope, receive, send):
        await asyncio.sleep(0.8)  # longer than a head may take
        await hello(scope, receive, send)

    with listening(slow) as port, connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert is_closed(connection)[1].endswith(b"ok")


def test_an_answer_that_nobody_reads_does_not_hold_its_connection():
    left = threading.Event()

    async def large(scope, receive, send):
        await receive()
        body = b"x" * 2**26  # more than the system's buffers hold
        await send({"type": "http.response.start", "status": 200,
                    "headers": [(b"content-length", str(len(body)).encode()),
                                (b"connection", b"close")]})  # fmt: skip
        await send({"type": "http.response.body", "body": body})
        left.set()

    with listening(large) as port, connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert left.wait(WAIT)
        threading.Event().wait(1.0)  # not reading, for longer than the server is patient
        try:
            received = 0
            while part := connection.recv(2**20):
                received += len(part)
        except ConnectionError:
            pass
        assert received < 2**26


def test_one_connection_too_many_is_closed_and_the_others_live():
    with listening(hello, seconds=WAIT, most=2) as port, connect(port) as a, connect(port) as b:
        ask(a)
        ask(b)
        with connect(port) as third:
            assert is_closed(third) == (True, b"")
        ask(a)


def test_a_head_without_end_is_refused():
    with listening(hello, seconds=WAIT) as port, connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 2**17)
        closed, said = is_closed(connection)
        assert closed
        assert b" 200 " not in said
