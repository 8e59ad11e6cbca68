"""Tool servers: a real one in a process of its own, over stdio and over streamable HTTP."""

import asyncio
import json
import socket
import sys
from pathlib import Path

import pytest

from tmlc.errors import UsageError
from tmlc.runtimes.background import mcp_tools
from tmlc.runtimes.background.endpoint import EndpointModel
from tmlc.runtimes.background.mcp_tools import CUT_MARK, MAX_OUTPUT, ToolBox, ToolServer

from .endpoint_server import chat_calls, chat_text, serve
from .test_delegations import Beside

COMMAND = (sys.executable, str(Path(__file__).with_name("tool_server.py")))


def with_tools(scene, *servers):
    async def main():
        box = ToolBox(servers or (ToolServer("t", COMMAND),))
        try:
            await scene(box)
        finally:
            await box.close()

    asyncio.run(main())


def test_tools_of_a_process_are_listed_and_called(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_SERVER", "s3cret")

    async def scene(box):
        tools = {tool.name: tool for tool in await box.tools()}
        assert set(tools) == {f"t__{n}" for n in ("add", "long", "fail", "environment", "sleep", "leave")}
        assert tools["t__add"].description == "Adds two numbers."
        assert set(tools["t__add"].schema["properties"]) == {"a", "b"}
        assert await box.call("t__add", '{"a": 2, "b": 40}') == "42"
        assert (await box.call("t__fail", "")).startswith("error: ")
        # The process sees nothing of this one's environment but what is named.
        assert await box.call("t__environment", '{"name": "SECRET_OF_THE_SERVER"}') == "(unset)"
        assert await box.call("t__environment", '{"name": "GIVEN"}') == "yes"

        text = await box.call("t__long", '{"size": 10000000}')
        assert len(text) == MAX_OUTPUT + len(CUT_MARK) and text.endswith(CUT_MARK)

        for name, arguments in [
            ("t__nothing", "{}"), ("other__add", "{}"), ("", ""), ("t__add", "[1]"), ("t__add", "{"),
            ("t__add", "[" * 100_000), ("t__add", '{"a": "' + "x" * 70_000 + '"}'), ("t__add", '{"a": "x"}'),
        ]:  # fmt: skip
            assert (await box.call(name, arguments)).startswith("error: ")

    with_tools(scene, ToolServer("t", COMMAND, env={"GIVEN": "yes"}))


def test_a_tool_that_hangs_is_left_and_a_server_that_is_gone_is_started_again(monkeypatch):
    async def scene(box):
        await box.tools()
        monkeypatch.setattr(mcp_tools, "CALL_SECONDS", 0.2)
        assert "within 0.2 s" in await box.call("t__sleep", '{"seconds": 1}')
        monkeypatch.setattr(mcp_tools, "CALL_SECONDS", 10.0)
        assert (await box.call("t__leave", "{}")).startswith("error: ")
        async with asyncio.timeout(20):
            while await box.call("t__add", '{"a": 1, "b": 1}') != "2":
                await box.tools()

    with_tools(scene)


def test_a_server_that_cannot_be_started_or_does_not_answer_is_left_out(monkeypatch):
    monkeypatch.setattr(mcp_tools, "CONNECT_SECONDS", 5.0)

    async def scene(box):
        assert {tool.name.partition("__")[0] for tool in await box.tools()} == {"t"}

    with_tools(
        scene,
        ToolServer("gone", ("/no/such/program",)),
        ToolServer("deaf", (sys.executable, "-c", "print('hello')")),
        ToolServer("far", url="http://127.0.0.1:9/mcp"),
        ToolServer("t", COMMAND),
    )


def test_tools_over_http_get_the_headers_that_are_given():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def scene(box):
        process = await asyncio.create_subprocess_exec(*COMMAND, "http", str(port), stderr=asyncio.subprocess.DEVNULL)
        try:
            async with asyncio.timeout(30):
                while not await box.tools():
                    await asyncio.sleep(0.1)
            assert await box.call("web__add", '{"a": 2, "b": 3}') == "5"
        finally:
            await box.close()
            process.kill()
            await process.wait()

    with_tools(scene, ToolServer("web", url=f"http://127.0.0.1:{port}/mcp", headers={"Authorization": "Bearer x"}))


def test_an_endpoint_uses_the_tools_of_a_server_and_its_answer_is_said(tokenizer):
    async def main():
        async with serve() as endpoint:
            endpoint.answers = [
                lambda body: chat_calls(("t__add", json.dumps({"a": 20, "b": 22}))),
                lambda body: chat_text(f"It is {body['messages'][-1]['content']}."),
            ]
            model = EndpointModel(endpoint.url, "thinker", tools=ToolBox([ToolServer("t", COMMAND)]))
            beside = Beside(tokenizer, model)
            beside.session.delegate("20 + 22?")
            await beside.ended()
            beside.edges.edges(20)
            await beside.close()
            assert beside.edges.said == "It is 42."

    asyncio.run(main())


@pytest.mark.parametrize(
    "servers",
    [
        [ToolServer("a", ("x",)), ToolServer("a", ("y",))],
        [ToolServer("a")],
        [ToolServer("a", ("x",), "http://127.0.0.1")],
        [ToolServer("a b", ("x",))],
        [ToolServer("", ("x",))],
    ],
)
def test_servers_that_make_no_sense_are_refused(servers):
    with pytest.raises(UsageError):
        ToolBox(servers)
