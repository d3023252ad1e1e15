"""The fleet page in a real browser, of a cluster that is the real nginx and agent in front of simulated GPUs."""

import asyncio
import contextlib
import json
import threading
import time
from concurrent.futures import Future

import pytest
from ansible_collections.gpufleet.core.plugins.module_utils.gateway_state import append_audit

from tests.browser import ENTER, TAB, chromium
from tests.templates.conftest import Gateway, article_fleet, running, short_folder
from tests.templates.gpu import OK
from tests.templates.test_gateway import statuses
from tests.templates.test_page import PAGE, watching

FIRST, SECOND, LAST = (f"cosyvoice2-{card}" for card in ("gpu01-0", "gpu01-1", "gpu03-1"))
READY = "document.querySelectorAll('.gpu [data-state=ready]').length"
TAKEN = "document.querySelectorAll('.slots:not(.places) .taken').length"
FADED_SECONDS = 0.4
"""What the colours of slots need at most."""


class Scene:
    """A cluster at work in a thread of its own, and a browser that looks at its page."""

    def __init__(self, cluster, loop, browser):
        self.cluster, self.browser, self._loop = cluster, browser, loop
        self.gateway, self.gpus = cluster.gateway, cluster.gpus
        self.state = self.gateway.folder / "var/lib/gpufleet-gateway"

    def do(self, coroutine) -> Future:
        """Begin something among the cluster's tasks."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, function):
        """Call something among them."""
        self._loop.call_soon_threadsafe(function)

    def read(self, expression):
        """The value of a JavaScript expression."""
        return self.browser.run(f"return {expression}")

    def text(self, identifier):
        """What an element shows."""
        return self.read(f"document.getElementById('{identifier}').innerText")

    def shows(self, expression, seconds=10.0):
        """Wait until a JavaScript expression holds; return the seconds that took."""
        return self.browser.wait(f"return {expression}", seconds)

    @contextlib.contextmanager
    def working(self, count):
        """Have so many requests at work during the block, and served at its end."""
        over = asyncio.Event()

        async def work():
            await over.wait()
            return OK

        for gpu in self.gpus.values():
            gpu.answer = work
        answers = self.do(self.cluster.burst(count))
        try:
            self.shows(f"{TAKEN} == {count}")
            yield
        finally:
            self.call(over.set)
        assert statuses(answers.result(10)) == {200: count}

    @contextlib.contextmanager
    def without_agent(self):
        """Kill the agent, and start one at the end of the block."""
        self.gateway.kill_agent()
        try:
            yield
        finally:
            self.do(self.gateway.start_agent()).result(20)


def card(instance, expression):
    """A JavaScript expression of the element that shows a GPU, undefined while there is none."""
    return f"document.querySelector('[data-instance={instance}]')?.{expression}"


def taken(instance, kind="slots"):
    """How many slots of a GPU, or `places` in its queue, are shown as taken."""
    return card(instance, f"querySelectorAll('.{kind} .taken').length")


@pytest.fixture(scope="module")
def world(nginx_program):
    """A cluster and a browser for all tests of this module."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def wait_for(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)

    with contextlib.ExitStack() as stack:
        stack.callback(loop.close)
        stack.callback(thread.join)
        stack.callback(loop.call_soon_threadsafe, loop.stop)
        gateway = Gateway(nginx_program, stack.enter_context(short_folder()))
        cluster_runs = running(gateway, article_fleet(queue=2, client_limit=12))
        cluster = wait_for(cluster_runs.__aenter__())
        stack.callback(lambda: wait_for(cluster_runs.__aexit__(None, None, None)))
        wait_for(gateway.start_agent())
        yield Scene(cluster, loop, stack.enter_context(chromium()))


@pytest.fixture
def scene(world):
    """The page, just opened, of a cluster that is well and idle. A test must use up what its console complains of."""
    for gpu in world.gpus.values():
        gpu.state, gpu.told = "ready", {"queue": 2}
    browser = world.browser
    browser.look(1280, 800)
    browser.prefer("en")
    browser.devtools("Storage.clearDataForOrigin", origin=PAGE.removesuffix("/cluster/"), storageTypes="all")
    browser.visit(PAGE)
    world.shows(f"{READY} == 6 && {TAKEN} == 0")
    browser.complaints()
    browser.requested()
    yield world
    assert browser.complaints() == []
    assert [url for url in browser.requested() if not url.startswith(PAGE)] == []


def test_slots_fill_and_empty_before_ones_eyes(scene):
    served = int(scene.read("document.querySelector('#sums [data-is=served]').innerText"))
    with scene.working(7):
        assert scene.read("document.querySelector('#sums [data-is=slots]').innerText") == "7 / 12"
        meters = "[...document.querySelectorAll('.slots:not(.places) [role=meter]')].map(meter => meter.ariaValueNow)"
        assert sum(map(int, scene.read(meters))) == 7
    scene.shows(f"{TAKEN} == 0")
    assert scene.read("document.querySelector('#sums [data-is=served]').innerText") == str(served + 7)


def test_a_drain_and_its_end_show_within_two_seconds(scene):
    state = card(SECOND, "querySelector('.state').innerText")
    for _ in range(3):
        flag = scene.gateway.drain(SECOND)
        drained = scene.shows(f"{state} == 'drained'")
        flag.unlink()
        served = scene.shows(f"{state} == 'ready'")
        if max(drained, served) < 2:
            return
    pytest.fail(f"not once in three times, on a machine that may be busy: {drained:.1f} and {served:.1f} s")


def test_a_drain_is_told_with_its_line_in_the_audit_log(scene):
    flag = scene.gateway.drain(SECOND)
    since = "2026-11-25T10:00:00+00:00"
    flag.write_text(json.dumps({"owner": "operator", "by": "alice@desk", "since": since, "reason": "a new fan"}))
    line = {"what": "drain", "instance": SECOND, "from": "serving", "to": "drained", "reason": "why", "result": "ok"}
    append_audit(scene.state, [{"by": "alice@desk", **line}])
    scene.shows(f"document.getElementById('changes').innerText.includes('{SECOND} drained')")
    scene.shows("document.getElementById('news').innerText == 'gpu01 GPU 1: drained'")
    assert scene.text("health") == "degraded"
    scene.shows(card(SECOND, "querySelector('[data-is=drain]').innerText.startsWith('Drained by an operator, ')"))
    assert scene.read(card(SECOND, "querySelector('[data-is=drain]').innerText")).endswith(": a new fan")
    assert "alice" not in scene.read("document.body.innerText")
    flag.unlink()


def test_a_queue_a_reason_and_what_is_down_are_told(scene):
    scene.gpus[FIRST].told = {"queue": 2, "waiting": 1}
    scene.gpus[SECOND].state, scene.gpus[SECOND].told = "suspect", {"reason": "<b>3</b> failed in a row"}
    scene.do(scene.gpus[LAST].stop()).result(5)
    try:
        scene.shows(f"{taken(FIRST, 'places')} == 1")
        scene.shows(card(SECOND, "innerText.includes('<b>3</b> failed in a row')"))
        scene.shows(card(LAST, "querySelector('.state').innerText == 'down'"))
        assert "refuses connections" in scene.read(card(LAST, "innerText"))
    finally:
        scene.do(scene.gpus[LAST].start()).result(5)


def test_the_language_is_the_browsers_or_the_one_chosen(scene):
    spoken = "[document.documentElement.lang, document.getElementById('hosts-title').innerText]"
    assert scene.read(spoken) == ["en", "Hosts and GPUs"]
    scene.browser.prefer("fr,zh-CN,en")
    scene.browser.visit(PAGE)
    scene.shows(card(FIRST, "innerText.includes('就绪')"))
    assert scene.read(spoken) == ["zh-CN", "主机与 GPU"]
    scene.browser.run("document.querySelector('[data-language=en]').click()")
    assert scene.read(spoken) == ["en", "Hosts and GPUs"]
    scene.browser.visit(PAGE)
    scene.shows(card(FIRST, "innerText.includes('ready')"))
    assert scene.read(spoken) == ["en", "Hosts and GPUs"], "what was chosen is kept"


TEXTS = """
const [names, done] = arguments;
const { speak, text } = await import("/cluster/texts.js");
done(["en", "zh"].map(language => (speak(language), names.map(name => text(name)))));
"""


def test_both_languages_have_all_texts(scene):
    names = scene.read("[...document.querySelectorAll('[data-text]')].map(part => part.dataset.text)")
    states = ["ready", "loading", "suspect", "recycling", "stopping", "failed", "draining", "drained", "down"]
    names += [f"state {state}" for state in states]
    names += [f"cluster {state}" for state in ("healthy", "degraded", "down")]
    names += [f"change {what}" for what in ("drain", "undrain", "forget the drain", "rollout")]
    names += [f"drained by {who}" for who in ("operator", "rollout", "null")]
    names += [f"why {why}" for why in ("silence", "unreachable", "agent_not_answering", "forbidden")]
    english, chinese = scene.browser.run_async(f"(async () => {{ {TEXTS} }}).apply(null, arguments)", names)
    assert all(english) and all(chinese)
    assert all(one != other for one, other in zip(english, chinese, strict=True))


CONTRASTS = """
const channel = value => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
const light = colour => 0.2126 * channel(colour[0]) + 0.7152 * channel(colour[1]) + 0.0722 * channel(colour[2]);
const parse = colour => colour.match(/[\\d.]+/g).map(Number);
const ground = node => {
  const colour = parse(getComputedStyle(node).backgroundColor);
  return colour.length == 3 || colour[3] == 1 ? colour : ground(node.parentElement);
};
const ratio = (colour, node) => {
  const [less, more] = [light(parse(colour)), light(ground(node))].sort((one, other) => one - other);
  return (more + 0.05) / (less + 0.05);
};
const seen = selector => [...document.querySelectorAll(selector)].filter(node => node.checkVisibility());
const hasText = node => [...node.childNodes].some(child => child.nodeType == 3 && child.data.trim());
const texts = seen("body *").filter(hasText);
return [
  texts.map(node => [ratio(getComputedStyle(node).color, node), node.innerText]),
  seen(".slots i").map(node => ratio(getComputedStyle(node).borderTopColor, node.parentElement)),
];
"""


@pytest.mark.parametrize(
    ("scheme", "ground"), [("light", "rgb(243, 245, 248)"), ("dark", "rgb(13, 17, 23)")], ids=["light", "dark"]
)
def test_light_and_dark_have_contrast(scene, scheme, ground):
    states = ["loading", "suspect", "recycling", "stopping", "failed"]
    for state, gpu in zip(states, scene.gpus.values(), strict=False):
        gpu.state, gpu.told = state, {"queue": 2, "waiting": 1, "in_flight": 1, "reason": "why"}
    scene.shows(f"{READY} == 1 && {TAKEN} == 5")
    scene.browser.look(1280, 800, scheme)
    scene.browser.run("for (const banner of document.querySelectorAll('.banner')) banner.hidden = false")
    scene.browser.run("for (const id of ['why', 'age', 'warning']) document.getElementById(id).innerText = id")
    time.sleep(FADED_SECONDS)
    texts, slots = scene.browser.run(CONTRASTS)
    assert len(texts) > 60 and min(texts)[0] >= 4.5, min(texts)
    assert len(slots) == 24 and min(slots) >= 3
    assert scene.read("getComputedStyle(document.body).backgroundColor") == ground


def test_everything_is_reached_by_keyboard_and_shows_where_one_is(scene):
    reached = []
    for _ in range(3):
        scene.browser.press(TAB)
        reached.append(scene.read("document.activeElement.innerText"))
        assert "solid 3px" in scene.read("getComputedStyle(document.activeElement).outline")
    assert reached == ["English", "中文", "The same as JSON"]
    focusable = "[...document.querySelectorAll('a, button, input, summary, [tabindex]')]"
    assert scene.read(f"{focusable}.filter(node => node.checkVisibility()).length") == 3
    scene.browser.run("document.querySelector('[data-language=zh]').focus()")
    scene.browser.press(ENTER)
    assert scene.read("[document.documentElement.lang, document.activeElement.ariaPressed]") == ["zh-CN", "true"]


def test_a_screen_reader_finds_headings_lists_and_meters_by_name(scene):
    scene.gpus[FIRST].told = {"queue": 2, "in_flight": 1}
    scene.shows(f"{taken(FIRST)} == 1")
    nodes = [node for node in scene.browser.devtools("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]

    def named(role):
        return [node["name"]["value"] for node in nodes if node["role"]["value"] == role]

    host = f"gpu01 {scene.gpus[FIRST].address}"
    assert {"gpufleet", "Now", "cosyvoice2", host, "GPU 0 cosyvoice2", "Last changes"} <= set(named("heading"))
    assert {"Now", "Hosts and GPUs", "Last changes"} <= set(named("region"))
    assert named("button") == ["English", "中文"] and named("group") == ["Language / 语言"]
    assert sorted(named("meter")) == ["Slots in use"] * 6 + ["Waiting"] * 6
    values = [node["value"]["value"] for node in nodes if node["role"]["value"] == "meter"]
    assert sorted(values) == [0] * 11 + [1]
    assert scene.read(card(FIRST, "querySelector('[role=meter]').getAttribute('aria-valuetext')")) == "1 of 2"
    assert len(named("listitem")) >= 6
    live = scene.read("[...document.querySelectorAll('[role=status], [role=alert], [aria-live]')].map(node => node.id)")
    assert live == ["why", "news"], "what changes every second is not read out"


def test_the_narrowest_phone_shows_it_without_scrolling_sideways(scene):
    scene.gpus[FIRST].state = "failed"
    scene.gpus[FIRST].told = {"reason": "no_blank_in_a_long_word_" * 6, "version": "0123456789ab-01234567"}
    scene.browser.look(320, 700, mobile=True)
    scene.browser.visit(PAGE)
    scene.shows(card(FIRST, "innerText.includes('no_blank')"))
    assert scene.read("document.documentElement.scrollWidth") == 320
    assert scene.read("[...document.querySelectorAll('button')].every(button => button.offsetHeight >= 32)")


def test_it_says_when_its_data_is_old_and_goes_on_by_itself(scene):
    with scene.without_agent():
        scene.shows("document.getElementById('why').innerText.startsWith('The agent does not answer.')", 3)
        scene.shows("/^These figures are [1-9]\\d* s old/.test(document.getElementById('age').innerText)")
        assert scene.read("document.body.className") == "old"
    scene.shows("document.getElementById('trouble').hidden && document.body.className == ''")
    scene.gpus[FIRST].told = {"in_flight": 1}
    scene.shows(f"{taken(FIRST)} == 1")
    assert all("503" in line for line in scene.browser.complaints())


def test_where_no_stream_is_left_it_asks_now_and_then(scene):
    released = asyncio.Event()
    held = threading.Event()

    async def hold():
        async with contextlib.AsyncExitStack() as watchers:
            streams = []
            while len(streams) < 8:  # until nginx has seen that the page has left
                stream = await watchers.enter_async_context(watching())
                streams += [stream] if stream.answer.status_code == 200 else []
            held.set()
            await released.wait()

    scene.browser.visit("about:blank")
    holding = scene.do(hold())
    assert held.wait(10)
    scene.browser.visit(PAGE)
    scene.shows(f"{READY} == 6")
    scene.gpus[FIRST].told = {"in_flight": 1}
    scene.shows(f"{taken(FIRST)} == 1")
    assert scene.read("document.getElementById('trouble').hidden")
    complaints = scene.browser.complaints()
    assert complaints and all("events" in line and "503" in line for line in complaints)
    scene.call(released.set)
    holding.result(10)


def test_a_tab_that_nobody_looks_at_has_no_stream(scene):
    looks = "Object.defineProperty(document, 'hidden', { value: %s, configurable: true });"
    looks += "document.dispatchEvent(new Event('visibilitychange'))"
    scene.browser.run(looks % "true")
    scene.gpus[FIRST].told = {"in_flight": 1}
    time.sleep(1.5)  # a pass and more
    assert scene.read(f"[{taken(FIRST)}, document.getElementById('trouble').hidden]") == [0, True]
    scene.browser.run(looks % "false")
    scene.shows(f"{taken(FIRST)} == 1")
