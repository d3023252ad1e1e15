"""The seam between a server that may drop a request at any moment and an app that is left to finish."""

from __future__ import annotations

import asyncio

from slot_guard.messages import Message, Receive, Send, announced, started, unbuffered


class Exchange:
    """One request's messages, passed on between the server's task and the app's.

    The server's task does every send itself. So a server that cancels it (Gunicorn does after a hang-up) also ends a
    send that waits for a client who is not there any more, while the app's own task is never cancelled.
    """

    def __init__(self, kind: str, receive: Receive, send: Send, from_gateway: bool = False) -> None:
        """Take the server's `receive` and `send` of a request of the scope type `kind` (http or websocket)."""
        self._from_gateway = from_gateway
        self.status: int | None = None
        """Status code of the answer, once the app has sent one."""
        self.answered = False
        """The app has sent its answer to the end."""
        self.missing = 0
        """Bytes that the answer's head has announced and that have not been sent."""
        self.told = False
        """The app has received the disconnect."""
        self.cut = False
        """The client left before the app had answered, so what the app did then says little about it."""
        self._disconnect: Message = {"type": f"{kind}.disconnect"}
        if kind == "websocket":
            self._disconnect["code"] = 1006
        self._server_receive = receive
        self._server_send = send
        self._outbox: asyncio.Queue[tuple[Message, asyncio.Future[None] | None] | None] = asyncio.Queue()
        # The first message is asked for before the app is called: it mostly is here already, and costs the app no wait.
        self._receiving: asyncio.Future[Message] | None = asyncio.ensure_future(receive())
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def gone(self) -> bool:
        """The server has dropped the request."""
        return self._gone.done()

    async def forward(self) -> None:
        """Send for the app until `end`; in the server's task."""
        fault: Exception | None = None  # also that of a head, until a send waits that can be told
        try:
            while (item := await self._outbox.get()) is not None:
                message, settled = item
                try:
                    if fault is None:
                        await self._server_send(message)
                except Exception as error:
                    fault = error
                finally:
                    if settled is not None:
                        _settle(settled, fault)
                        fault = None
        except asyncio.CancelledError:
            self._gone.set_result(None)
            self.cut = self.cut or not self.answered
            while not self._outbox.empty():
                if (item := self._outbox.get_nowait()) is not None and item[1] is not None:
                    _settle(item[1])
            raise
        if fault is not None:
            raise fault

    def end(self) -> None:
        """The app has returned: let `forward` return too, and drop a receive that nobody waits for."""
        self._outbox.put_nowait(None)
        if self._receiving is not None:
            self._receiving.cancel()

    async def receive(self) -> Message:
        """The app's receive: what the server has, or a disconnect once it has dropped the request.

        A cancelled call loses no message: the next one waits for the same.
        """
        if self._receiving is None:
            self._receiving = asyncio.ensure_future(self._server_receive())
        receiving = self._receiving
        if not (receiving.done() or self._gone.done()):
            await asyncio.wait((receiving, self._gone), return_when=asyncio.FIRST_COMPLETED)
        if self._gone.done():
            self.told = True
            return dict(self._disconnect)
        self._receiving = None
        message = receiving.result()
        if message["type"] == self._disconnect["type"]:
            self.told = True
            self.cut = self.cut or not self.answered
        return message

    async def send(self, message: Message) -> None:
        """The app's send; once the client has left, messages are dropped.

        They are not refused: an exception in mid-stream would end the app's call while threads of its model work on.
        An app that can stop early learns of the disconnect by `receive`.

        The head is not waited for, so that what follows at once is sent in the same turn of the event loop. Where the
        server does not take it, the next send raises.
        """
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.missing = announced(message)
            message = unbuffered(started(message) if self._from_gateway else message)
        elif message["type"] == "http.response.body":
            self.missing -= len(message.get("body", b""))
            self.answered = self.answered or not message.get("more_body")
        if self._gone.done():
            return
        if message["type"] == "http.response.start":
            self._outbox.put_nowait((message, None))
            return
        settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._outbox.put_nowait((message, settled))
        await settled


def _settle(settled: asyncio.Future[None], error: Exception | None = None) -> None:
    """Let the app's send return or raise, if it still waits."""
    if settled.done():
        return
    if error is None:
        settled.set_result(None)
    else:
        settled.set_exception(error)
