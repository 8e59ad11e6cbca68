"""A real MCP server for the tests, over stdio or HTTP: `python tool_server.py [http PORT]`."""

import os
import sys
import time

from mcp.server.mcpserver import MCPServer

server = MCPServer("tools")


@server.tool()
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


@server.tool()
def long(size: int) -> str:
    """Gives a long text."""
    return "x" * size


@server.tool()
def fail() -> str:
    """Always fails."""
    raise ValueError("no such city")


@server.tool()
def environment(name: str) -> str:
    """An environment variable."""
    return os.environ.get(name, "(unset)")


@server.tool()
def sleep(seconds: float) -> str:
    """Takes its time."""
    time.sleep(seconds)
    return "awake"


@server.tool()
def leave() -> str:
    """Ends the server."""
    os._exit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["http"]:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[2]))
    else:
        server.run("stdio")
