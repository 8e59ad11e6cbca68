"""What must not be left behind or lost when something fails half way: starts, resumptions, writes to disk."""

import asyncio
import threading

import pytest

from tmlc.errors import SessionError
from tmlc.runtimes.gateway.sessions import Opening
from tmlc.runtimes.gateway.snapshots import Kept

FOLDERS = pytest.mark.parametrize("folder", [False, True])


def token_of(wire):
    return next(event for event in wire.events if event["type"] in ("session.started", "session.created"))["tmlc"][
        "resume_token"
    ]


async def end(desk, wire):
    """The client leaves, nobody comes back, and the session is kept."""
    await wire.socket.close()
    desk.wires.remove(wire)
    await desk.edges(60)
    await desk.hub.sessions.flush()


async def back(desk, dialect, token):
    wire = await desk.connect(dialect, f"tmlc_resume={token}")
    await wire.sync()
    return wire


async def refused(desk, dialect, token, code):
    wire = await back(desk, dialect, token)
    await wire.close_code()
    desk.wires.remove(wire)
    assert [event["error"]["code"] for event in wire.events] == [code]
    return wire.events[0]["error"]["message"]


@FOLDERS
def test_a_token_that_could_not_be_used_can_be_used_later(desk, folder):
    async def test(desk):
        wire = await desk.live()
        token = token_of(wire)
        other = "this session was opened in the dialect live. resume it in that dialect, or start a new session"
        assert await refused(desk, "realtime", token, "session_not_found") == other
        await end(desk, wire)
        assert await refused(desk, "realtime", token, "session_not_found") == other
        admit, desk.scheduler.admit = desk.scheduler.admit, lambda: None
        others = [desk.hub.sessions.open(Opening("live")) for _ in range(2)]  # the slots are gone between two looks
        await refused(desk, "live", token, "rate_limit_exceeded")
        desk.scheduler.admit = admit
        for other in others:
            other.close()
        await desk.edges()
        again = await back(desk, "live", token)
        assert again.events[0]["tmlc"]["resumed"]

    desk(test, folder=folder)


@FOLDERS
def test_the_tasks_of_a_client_outlive_a_restart(desk, folder):
    async def test(desk):
        wire = await desk.live()
        desk.model.delegates("count")
        await desk.edges(2)
        name = wire.of("session.delegation.created")[0]["delegation"]["id"]
        token = token_of(wire)
        await end(desk, wire)
        again = await back(desk, "live", token)
        (ack,) = await again.ask("session.thinking.append", content="x", delegation_id=name)
        assert ack["type"] == "session.thinking.appended"

    desk(test, folder=folder)


@pytest.mark.parametrize("dialect", ["live", "realtime"])
@pytest.mark.parametrize("config", [{}, {"resolved": 3, "session": 3}, {"session": {"audio": {}}}])
def test_what_is_kept_of_a_session_and_damaged_opens_nothing(desk, dialect, config):
    async def test(desk):
        wire = await (desk.live() if dialect == "live" else desk.realtime())
        blob = wire and next(iter(desk.hub.sessions._by_token.values())).seat.snapshot()
        await desk.edges()
        options = {"pace": "realtime", "playback": False, "client_tasks": False, "instructions": None}
        kept = Kept(dialect, {"options": options, **config}, 3, 1e12, blob.result())
        desk.hub.sessions._ended.write("stranger", kept)
        again = await back(desk, dialect, "stranger")
        await again.close_code()
        assert again.events[-1]["error"]["code"] == "server_error"
        desk.wires.remove(again)
        await desk.edges()
        assert desk.open_seats == len(desk.hub.sessions) == 1  # the other one

    desk(test)


def test_a_connection_that_is_lost_while_another_takes_over_takes_nothing_with_it(desk):
    async def test(desk):
        wire = await desk.live(tmlc={"events": True})
        drop, held = desk.hub.sessions.store.drop, threading.Event()
        desk.hub.sessions.store.drop = lambda token: (held.wait(5), drop(token))
        coming = asyncio.create_task(desk.connect("live", f"tmlc_resume={token_of(wire)}"))
        await asyncio.sleep(0.02)
        await wire.socket.close()  # while the old token's file is being removed
        await asyncio.sleep(0.02)
        held.set()
        again = await coming
        desk.wires = [again]
        await desk.edges(3)
        assert desk.scheduler.stats().ticking == 1 and len(again.of("tmlc.tick")) >= 2

    desk(test, folder=True)


def test_who_takes_over_while_the_session_is_written_is_kept_under_the_new_token(desk):
    async def test(desk):
        wire = await desk.live()
        sessions, held = desk.hub.sessions, threading.Event()
        write = sessions.store.write
        sessions.store.write = lambda token, kept: (held.wait(5), write(token, kept))
        (session,) = sessions._by_token.values()
        old = session.token
        sessions.keep(session)
        await desk.edges()
        again = await back(desk, "live", old)
        desk.wires.remove(wire)
        held.set()
        await sessions.flush()
        assert sessions.store.take(old) is None
        assert sessions.store.take(token_of(again)) is not None

    desk(test, folder=True)


def test_a_disk_that_fails_costs_no_session(desk, caplog):
    async def test(desk):
        def full(*_):
            raise OSError("no space")

        desk.hub.sessions.store.write = desk.hub.sessions.store.drop = full
        wire = await desk.live(tmlc={"events": True})
        await desk.edges(30)
        again = await back(desk, "live", token_of(wire))
        desk.wires.remove(wire)
        await desk.edges(2)
        assert len(again.of("tmlc.tick")) >= 2
        await desk.hub.sessions.flush()

    desk(test, folder=True)
    assert "could not be kept: no space" in caplog.text and "could not be removed" in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


def test_a_writer_that_fails_closes_its_connection_and_the_session_can_be_resumed(desk, caplog):
    async def test(desk):
        wire = await desk.live()

        def fail(*_):
            raise ValueError("no")

        desk.connection.observer = type("Broken", (), {"message": fail, "refused": fail})()
        desk.wires.remove(wire)
        await desk.edges()
        await wire.close_code()
        await desk.edges()
        assert desk.scheduler.stats().detached == 1

    desk(test)
    assert "could not be written to" in caplog.text


def test_a_log_that_cannot_be_opened_leaves_nothing_open(desk):
    async def test(desk):
        def full():
            raise OSError("no space")

        desk.hub.sessions._logs = full
        wire = await desk.connect("live")
        (event,) = await wire.ask("session.start", session={"model": "m"})
        assert event["error"]["code"] == "server_error" and desk.open_seats == 0
        desk.hub.sessions._logs = None
        (event,) = await wire.ask("session.start", session={"model": "m"})
        assert event["type"] == "session.started"

    desk(test)


def test_nothing_follows_the_end_of_a_session(desk):
    async def test(desk):
        wire = await desk.live()
        (session,) = desk.hub.sessions._by_token.values()
        session.close()
        await desk.edges()
        await wire.close_code()
        session._client_task("late")
        assert wire.events[-1]["type"] == "session.closed" and not session.tasks
        with pytest.raises(SessionError):
            session.say("late")

    desk(test)


def test_a_picture_whose_client_has_left_is_not_in_the_way_of_the_next(desk):
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.new("RGB", (64, 64), (9, 9, 9)).save(file, "PNG")

    async def test(desk):
        frames = desk.hub._frames
        await frames.start()
        left = [asyncio.create_task(frames.decode(file.getvalue())) for _ in range(3)]
        await asyncio.sleep(0)
        for task in left:
            task.cancel()
        frame = await frames.decode(file.getvalue())
        assert frame.shape == (16, 16, 3) and frames._waiting == 0

    desk(test, sees=True)
