"""A server with both OpenAI-compatible interfaces, on loopback; a test says what it answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web


def chat_text(text: str, size: int = 3) -> Iterator[dict[str, Any]]:
    for at in range(0, len(text), size):
        yield chat_chunk({"content": text[at : at + size]})
    yield chat_chunk({}, "stop")


def chat_calls(*calls: tuple[str, str]) -> Iterator[dict[str, Any]]:
    """Tool calls whose arguments come in two pieces, as real endpoints send them."""
    for index, (name, arguments) in enumerate(calls):
        half = len(arguments) // 2
        first = {"index": index, "id": f"call_{index}", "type": "function"}
        yield chat_chunk({"tool_calls": [first | {"function": {"name": name, "arguments": arguments[:half]}}]})
        yield chat_chunk({"tool_calls": [{"index": index, "function": {"arguments": arguments[half:]}}]})
    yield chat_chunk({}, "tool_calls")


def chat_chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


def responses_text(text: str, size: int = 3) -> Iterator[dict[str, Any]]:
    for n, at in enumerate(range(0, len(text), size)):
        yield {
            "type": "response.output_text.delta", "delta": text[at : at + size], "item_id": "msg", "output_index": 0,
            "content_index": 0, "sequence_number": n, "logprobs": [],
        }  # fmt: skip
    yield {"type": "response.completed", "sequence_number": 999, "response": {"id": "r", "output": []}}


def responses_calls(*calls: tuple[str, str]) -> Iterator[dict[str, Any]]:
    for index, (name, arguments) in enumerate(calls):
        item = {"type": "function_call", "id": f"fc_{index}", "call_id": f"call_{index}", "name": name,
                "arguments": arguments, "status": "completed"}  # fmt: skip
        yield {"type": "response.output_item.done", "item": item, "output_index": index, "sequence_number": index}


class Endpoint:
    """What was asked, and what is answered: `answers` are taken in turn, the last one again and again; each is called
    with the request's body and gives events, bytes to send as they are, or a `web.Response`; None hangs.
    """

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.answers: list[Callable[[dict[str, Any]], Any]] = []
        self.url = ""
        self.dropped = 0  # connections that the client closed while it was answered
        self.hanging = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.paths.append(request.path)
        given = self.answers[min(len(self.asked), len(self.answers)) - 1](body)
        if isinstance(given, web.Response):
            return given
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            for event in given:
                if event is None:
                    await self.hanging.wait()
                    continue
                name = f"event: {event['type']}\n".encode() if isinstance(event, dict) and "type" in event else b""
                data = event if isinstance(event, bytes) else name + f"data: {json.dumps(event)}\n\n".encode()
                await response.write(data)
            if request.path.endswith("/chat/completions"):
                await response.write(b"data: [DONE]\n\n")
        except ConnectionError:
            self.dropped += 1
        return response


@asynccontextmanager
async def serve():
    endpoint = Endpoint()
    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/v1/chat/completions", endpoint.answer)
    app.router.add_post("/v1/responses", endpoint.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    endpoint.url = f"http://127.0.0.1:{port}/v1"
    try:
        yield endpoint
    finally:
        endpoint.hanging.set()
        await runner.cleanup()
