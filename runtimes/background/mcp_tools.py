"""Tools of MCP servers for a background model, by the official `mcp` package: over stdio or streamable HTTP.

A server is connected when its tools are first asked for, on the loop of the worker, and again after it has gone. What a
tool gives is data: its text goes back to the model that called it, cut to `MAX_OUTPUT` characters.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tmlc.errors import UsageError
from tmlc.runtimes.background.capped_http import capped

MAX_TOOLS = 64
"""Tools of all servers together; more are left out."""
MAX_SCHEMA = 16_384
"""Characters of a tool's schema as JSON; a tool with a longer one is left out."""
MAX_DESCRIPTION = 1_000
MAX_ARGUMENTS = 65_536
MAX_OUTPUT = 16_000
CUT_MARK = " […]"
CALL_SECONDS = 30.0
CONNECT_SECONDS = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ToolServer:
    """Where a server is: a `command` with its arguments, or a `url`.

    Attributes:
        name: the first part of its tools' names, letters, digits and `_`.
        env: further environment variables of the command; by default it gets PATH and a few harmless ones.
        headers: of HTTP requests, such as Authorization.
    """

    name: str
    command: Sequence[str] = ()
    url: str = ""
    env: dict[str, str] = field(default_factory=dict, repr=False)
    headers: dict[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool as it is offered to a model: `name` is `server__tool`; `schema` is the JSON Schema of its arguments."""

    name: str
    description: str
    schema: dict[str, Any]


class ToolBox:
    """The tools of some servers. All on one event loop at a time; on another one the servers are connected anew.

    Raises UsageError: two servers of one name, or one with neither command nor url; the `mcp` package is missing.
    """

    def __init__(self, servers: Sequence[ToolServer]) -> None:
        try:
            import mcp  # noqa: F401  fails here, and not in the first delegation
        except ImportError:
            raise UsageError(
                "tool servers need the `mcp` package", fix="pip install 'tmlc[background]'"
            ) from None
        if len({server.name for server in servers}) != len(servers):
            raise UsageError("two tool servers have the same name", where="mcp", fix="give each its own")
        for server in servers:
            if not re.fullmatch(r"[A-Za-z0-9_]{1,24}", server.name) or bool(server.command) == bool(server.url):
                raise UsageError(
                    f"tool server {server.name!r} cannot be used as written", where="mcp",
                    fix="a name of letters, digits and _, and either a command or a url",
                )  # fmt: skip
        self._servers = tuple(servers)
        self._lines: dict[str, _Connection] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def tools(self) -> list[Tool]:
        """What all servers that answer offer. A server that does not is logged and left out."""
        self._on_this_loop()
        lines = await asyncio.gather(*(self._line(server) for server in self._servers))
        return [tool for line in lines if line is not None for tool in line.tools][:MAX_TOOLS]

    async def call(self, name: str, arguments: str) -> str:
        """Calls the tool `name` with JSON arguments; what it gives, or what is wrong, as text for the model."""
        self._on_this_loop()
        line = self._lines.get(name.partition("__")[0])
        tool = line.names.get(name) if line is not None and line.alive else None
        if line is None or tool is None:
            return f"error: there is no tool {name[:80]!r}"
        try:
            given = json.loads(arguments[: MAX_ARGUMENTS + 1] or "{}")
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict) or len(arguments) > MAX_ARGUMENTS:
            return "error: the arguments are not a JSON object of a reasonable size"
        try:
            async with asyncio.timeout(CALL_SECONDS):
                result = await line.client.call_tool(tool, given)
        except TimeoutError:
            return f"error: the tool gave nothing within {CALL_SECONDS:g} s"
        except Exception as error:
            log.warning("tool %s failed: %s", name, type(error).__name__)
            line.doubt(error)
            return f"error: the tool failed ({type(error).__name__})"
        text = _text(result.content)
        return f"error: {text}" if result.is_error else text

    async def close(self) -> None:
        """Ends all connections and the processes that were started."""
        lines, self._lines = list(self._lines.values()), {}
        await asyncio.gather(*(line.close() for line in lines))

    def _on_this_loop(self) -> None:
        if self._loop is not asyncio.get_running_loop():
            # The thread of the old loop was blocked and given up; its connections went with it.
            self._loop, self._lines = asyncio.get_running_loop(), {}

    async def _line(self, server: ToolServer) -> _Connection | None:
        line = self._lines.get(server.name)
        if line is None or not line.alive:
            line = self._lines[server.name] = _Connection(server)
        try:
            await asyncio.shield(line.ready)
        except Exception as error:
            log.warning("tool server %s does not answer: %s", server.name, type(error).__name__)
            return None
        return line


class _Connection:
    """One connected server; entered and left by one task, as the package's scopes want it."""

    def __init__(self, server: ToolServer) -> None:
        loop = asyncio.get_running_loop()
        self.server = server
        self.tools: list[Tool] = []
        self.names: dict[str, str] = {}
        self.client: Any = None
        self.ready: asyncio.Future[None] = loop.create_future()
        self._leave = asyncio.Event()
        self._task = loop.create_task(self._serve())

    @property
    def alive(self) -> bool:
        return not self._task.done() and not self._leave.is_set()

    def doubt(self, error: Exception) -> None:
        """A call failed: when the connection is why, it is left, and made anew when tools are asked for again."""
        from mcp_types import CONNECTION_CLOSED

        if getattr(error, "code", None) == CONNECTION_CLOSED:
            self._leave.set()

    async def close(self) -> None:
        self._leave.set()
        await asyncio.wait([self._task], timeout=CONNECT_SECONDS)

    async def _serve(self) -> None:
        try:
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(CONNECT_SECONDS):
                    self.client = await stack.enter_async_context(await self._connect(stack))
                    await self._list()
                self.ready.set_result(None)
                await self._watch()
        except Exception as error:
            if self.ready.done():
                log.warning("tool server %s is gone: %s", self.server.name, type(error).__name__)
            else:
                self.ready.set_exception(error)
                self.ready.exception()  # nobody may be waiting for it
        finally:
            if not self.ready.done():
                self.ready.cancel()

    async def _watch(self) -> None:
        """Returns when the connection is to be left, or when the server no longer answers."""
        while not self._leave.is_set():
            try:
                async with asyncio.timeout(CALL_SECONDS):
                    await self._leave.wait()
            except TimeoutError:
                await asyncio.wait_for(self.client.list_tools(cache_mode="bypass"), CONNECT_SECONDS)

    async def _connect(self, stack: AsyncExitStack) -> Any:
        import httpx2
        from mcp import Client, StdioServerParameters, stdio_client
        from mcp.client.streamable_http import streamable_http_client

        server = self.server
        if server.url:
            web = capped(httpx2.AsyncClient, headers=server.headers, timeout=CALL_SECONDS)
            await stack.enter_async_context(web)
            return Client(streamable_http_client(server.url, http_client=web), cache=None)
        # What a server writes to its standard error could be anything, and as much as it likes.
        nowhere = stack.enter_context(Path(os.devnull).open("w"))  # noqa: SIM115  the stack closes it
        program, *arguments = server.command
        parameters = StdioServerParameters(command=program, args=arguments, env=dict(server.env))
        return Client(stdio_client(parameters, errlog=nowhere), cache=None)

    async def _list(self) -> None:
        cursor = None
        while len(self.tools) < MAX_TOOLS:
            page = await self.client.list_tools(cursor=cursor)
            for tool in page.tools:
                name = f"{self.server.name}__{tool.name}"
                size = len(json.dumps(tool.input_schema))
                if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) or size > MAX_SCHEMA or name in self.names:
                    log.warning("a tool of server %s cannot be offered", self.server.name)
                    continue
                self.names[name] = tool.name
                self.tools.append(Tool(name, (tool.description or "")[:MAX_DESCRIPTION], tool.input_schema))
            cursor = page.next_cursor
            if not cursor or not page.tools:
                return


def _text(content: Sequence[Any]) -> str:
    """The texts of a tool's result, and the kinds of what else it holds."""
    parts, room = [], MAX_OUTPUT
    for block in content:
        text = block.text if block.type == "text" else f"[{block.type}]"
        parts.append(text[:room] + (CUT_MARK if len(text) > room else ""))
        room -= len(text)
        if room <= 0:
            break
    return "\n".join(parts)
