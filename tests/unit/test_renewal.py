"""What of nginx's log makes the gateway count anew, and what not. tests/templates has the real nginx."""

import contextlib

import pytest
from fleet_agent.renewal import Log, Renewal, with_other_size

ZONES = {
    "instance.conf": "limit_conn_zone $server_name zone=instance:10m;\n",
    "service.conf": "limit_conn_zone $service zone=service:10m;\n",
}
DEATH = "2026/11/25 21:27:01 [alert] 7#7: worker process 19 exited on signal 9\n"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "zones").mkdir()
    for name, text in ZONES.items():
        (tmp_path / "zones" / name).write_text(text)
    return tmp_path


@pytest.fixture
def renewal(files):
    """`renewal()` is a new process's."""
    with contextlib.ExitStack() as stack:
        arguments = (files / "error.log", files / "zones", files / "nginx.pid")
        yield lambda: stack.enter_context(contextlib.closing(Renewal(*arguments)))


def zones(files):
    return {path.name: path.read_text() for path in (files / "zones").glob("*.conf")}


def write(files, text):
    with (files / "error.log").open("a") as log:
        log.write(text)


@pytest.mark.parametrize(
    "line",
    [
        DEATH,
        "2026/11/25 21:27:01 [alert] 7#7: worker process 19 exited on signal 11 (core dumped)\n",
        "2026/11/25 21:27:01 [alert] 7#7: worker process 19 exited with fatal code 2 and cannot be respawned\n",
    ],
)
def test_a_death_renews_all_zones_once(files, renewal, line):
    write(files, line)
    running = renewal()
    assert running.look() and not running.look()
    assert zones(files) == {name: text.replace(":10m", ":11m") for name, text in ZONES.items()}


@pytest.mark.parametrize(
    "line",
    [
        "2026/11/25 21:27:01 [notice] 7#7: worker process 19 exited with code 0\n",
        f'2026/11/25 21:27:01 [error] 9#9: *1 access forbidden by rule, host: "{DEATH.strip()}"\n',
        DEATH.rstrip(),
    ],
    ids=["the end of an old worker", "what a client says", "half a line"],
)
def test_anything_else_does_not(files, renewal, line):
    write(files, line)
    assert not renewal().look()
    assert zones(files) == ZONES


def test_deaths_at_a_time_are_one_renewal_and_later_ones_another(files, renewal):
    running = renewal()
    write(files, 2 * DEATH)
    assert running.look()
    write(files, DEATH)
    assert running.look() and not running.look()
    assert all(":12m;" in text for text in zones(files).values())


def test_a_new_process_goes_on_where_the_last_left_off(files, renewal):
    write(files, DEATH)
    assert renewal().look()
    assert not renewal().look()
    write(files, DEATH)
    assert renewal().look()


def test_a_rotated_log_is_read_to_its_end_and_its_successor_from_its_beginning(tmp_path):
    path = tmp_path / "error.log"
    with contextlib.closing(Log(path)) as log:
        read_on(path, log)


def read_on(path, log):
    assert log.read() == b""
    path.write_text("one\n")
    assert log.read() == b"one\n"
    with path.open("a") as old:
        path.rename(path.with_name("error.log.1"))
        old.write("two\n")
    assert log.read() == b"two\n"
    path.write_text("three\nfo")
    assert log.read() == b"three\n"
    with path.open("a") as file:
        file.write("ur\n")
    assert log.read() == b"four\n"


def test_a_log_that_was_emptied_in_place_is_read_from_its_beginning(files, renewal):
    write(files, 3 * DEATH)
    running = renewal()
    assert running.look()
    (files / "error.log").write_text("")
    assert not running.look()
    write(files, DEATH)
    assert running.look() and not running.look()


def test_sizes_go_round_and_neighbours_differ():
    texts = [ZONES["instance.conf"]]
    for _ in range(10):
        texts.append(with_other_size(texts[-1]))
    assert texts[-1] == texts[0] and len(set(texts)) == 10
