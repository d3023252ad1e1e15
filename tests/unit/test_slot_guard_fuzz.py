"""The guard between clients and an app that do anything at any moment: slots are never exceeded, always returned."""

import asyncio
import threading

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_slot_guard import GATEWAY, make_guard, run_quietly, running, settle

BODY = {"type": "http.response.body", "body": b"x"}
#: What an app does, in order or not: ASGI as it should be, and as no server takes it.
APP_STEPS = {
    "start": {"type": "http.response.start", "status": 200, "headers": []},
    "start again": {"type": "http.response.start", "status": 500},
    "own 429": {"type": "http.response.start", "status": 429, "headers": [(b"x", b"y")]},
    "piece": {**BODY, "more_body": True},
    "end": BODY,
    "accept": {"type": "websocket.accept"},
    "frame": {"type": "websocket.send", "text": "x"},
    "close": {"type": "websocket.close"},
    "unknown": {"type": "http.no.such.thing"},
    "no type": {},
    "receive": None,
    "receive and cancel it": None,
    "thread": None,
    "raise": None,
    "cancel itself": None,
    "exit": None,
}
#: What a client and its server do.
CLIENT_STEPS = ["request", "piece", "disconnect", "hang up", "break the send", "stop reading", "read on"]

EXCHANGES = st.tuples(
    st.sampled_from(["http", "http", "http", "websocket"]),
    st.booleans(),
    st.lists(st.sampled_from(list(APP_STEPS)), max_size=6),
    st.lists(st.sampled_from(CLIENT_STEPS), max_size=4),
)


class Client:
    """One request of a server that cancels, breaks and holds its calls as told; its scope has the steps of its app."""

    def __init__(self, guard, kind, gateway, app_steps):
        self.events = asyncio.Queue()
        self.reading = asyncio.Event()
        self.reading.set()
        self.broken = False
        headers = GATEWAY if gateway else []
        scope = {"type": kind, "method": "POST", "path": "/", "headers": headers, "client": ("127.0.0.1", 1)}
        self.server = asyncio.create_task(guard({**scope, "steps": app_steps}, self.events.get, self.send))

    async def send(self, message):
        await self.reading.wait()
        if self.broken:
            raise ConnectionResetError("the client is gone")

    async def do(self, step):
        if step == "request":
            self.events.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        elif step == "piece":
            self.events.put_nowait({"type": "http.request", "body": b"x", "more_body": True})
        elif step == "disconnect":
            self.events.put_nowait({"type": "http.disconnect"})
        elif step == "hang up":
            self.server.cancel()
        elif step == "break the send":
            self.broken = True
        elif step == "stop reading":
            self.reading.clear()
        elif step == "read on":
            self.reading.set()

    async def leave(self):
        """As every client does in the end; return what the server is told of the request."""
        self.reading.set()
        for _ in range(10):
            self.events.put_nowait({"type": "http.disconnect"})
        (outcome,) = await asyncio.wait_for(asyncio.gather(self.server, return_exceptions=True), 5)
        return outcome


class App:
    """Does the steps of its scope; counts who works for a request at a time, its threads included."""

    def __init__(self):
        self.working = self.peak = 0
        self.threads = []

    def enter(self):
        self.working += 1
        self.peak = max(self.peak, self.working)

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            raise NotImplementedError
        self.enter()
        pieces = []
        try:
            for step in scope["steps"]:
                await self.do(step, receive, send, pieces)
        finally:
            # The slot is held until the last of its threads has ended; so is this count.
            left = [piece for piece in pieces if not piece.done()]
            if left:
                asyncio.gather(*left).add_done_callback(lambda _: self.leave())
            else:
                self.leave()

    def leave(self):
        self.working -= 1

    async def do(self, step, receive, send, pieces):
        if step == "receive":
            await receive()
        elif step == "receive and cancel it":
            asyncio.ensure_future(receive()).cancel()
            await asyncio.sleep(0)
        elif step == "thread":
            ending = threading.Event()
            self.threads.append(ending)
            pieces.append(asyncio.get_running_loop().run_in_executor(None, ending.wait))
        elif step == "raise":
            raise RuntimeError("as told")
        elif step == "cancel itself":
            asyncio.current_task().cancel()
            await asyncio.sleep(0)
        elif step == "exit":
            raise asyncio.CancelledError
        else:
            await send(dict(APP_STEPS[step]))


@settings(max_examples=100)
@given(st.integers(1, 3), st.lists(EXCHANGES, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_slots_are_never_exceeded_and_always_returned(slots, exchanges, random):
    async def play():
        app = App()
        try:
            async with running(make_guard(app, slots, SLOT_GUARD_FAILURES="999")) as guard:
                clients, orders = [], []
                for kind, gateway, app_steps, client_steps in exchanges:
                    client = Client(guard, kind, gateway, app_steps)
                    clients.append(client)
                    orders += [(client, step) for step in client_steps]
                random.shuffle(orders)
                for client, step in orders:
                    await client.do(step)
                    if random.random() < 0.5:
                        await settle()
                    assert app.working <= guard.slots.in_flight <= slots
                outcomes = [await client.leave() for client in clients]
                for ending in app.threads:
                    ending.set()
                await asyncio.wait_for(guard.slots.all_free(), 5)
                assert app.peak <= slots
                assert not guard._running
                # Who is cancelled before it was let in is neither served nor refused.
                cancelled = sum(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
                assert len(clients) - cancelled <= sum(guard.requests.values()) <= len(clients)
        finally:
            for ending in app.threads:
                ending.set()

    run_quietly(play())
