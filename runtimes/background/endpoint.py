"""Any OpenAI-compatible endpoint as background model, through the `openai` package: chat completions or responses,
streaming, with the tools of MCP servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tmlc.errors import BackgroundError, UsageError
from tmlc.runtimes.background.capped_http import capped
from tmlc.runtimes.background.injections import MAX_CHARACTERS
from tmlc.runtimes.background.mcp_tools import MAX_ARGUMENTS, Tool, ToolBox
from tmlc.runtimes.background.model import BackgroundModel, Context, Delegation, Event, Progress, Result, ToolCall
from tmlc.runtimes.background.prompt import data_url, system_text, user_text

MAX_ROUNDS = 8
"""Rounds with tools; the one after it has to answer without."""
MAX_CALLS = 8
"""Tools that one round may call; further calls are answered with an error."""
RETRIES = 2
"""How often a request that did not get through is tried again."""
REQUEST_SECONDS = 60.0
"""Without a byte for so long, a request is given up. The delegation has its own timeout beside it."""
_KEY = "give a key that it accepts (`key_env` of the settings)"
_STATUS = {
    401: _KEY,
    403: _KEY,
    404: "check `url` and `name` of the model",
    429: "wait until it takes more, or lower `live` of the limits",
}
"""What to do about a status."""
_LOOK = "see the endpoint's own log"


class Api(StrEnum):
    """Which of the two interfaces the endpoint has."""

    CHAT = "chat"
    RESPONSES = "responses"


@dataclass(slots=True)
class _Call:
    """A tool call as its pieces come."""

    id: str = ""
    name: str = ""
    arguments: str = ""

    def extend(self, text: str) -> None:
        if len(self.arguments) <= MAX_ARGUMENTS:
            self.arguments += text


@dataclass(slots=True)
class _Round:
    """What one answer of the endpoint holds."""

    text: str = ""
    calls: dict[Any, _Call] = field(default_factory=dict)

    def call(self, key: Any) -> _Call | None:
        """The call with this key; None when there are too many to keep."""
        if key not in self.calls and len(self.calls) > MAX_CALLS:
            return None
        return self.calls.setdefault(key, _Call())


class EndpointModel(BackgroundModel):
    """Asks an endpoint.

    Args:
        url: its base, such as `http://127.0.0.1:8000/v1`.
        name: of the model there.
        key: the bearer key; kept in the client only, and in no message. None for an endpoint without keys.
        api: which interface.
        tools: offered to the model; what it calls is run here, and what the tools give goes back to it.
        images: send the recent frames along; only for models that see.
        max_tokens: of an answer; None leaves it to the endpoint.

    Raises UsageError: the `openai` package is missing.
    """

    def __init__(
        self,
        url: str,
        name: str,
        *,
        key: str | None = None,
        api: Api = Api.CHAT,
        tools: ToolBox | None = None,
        images: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        try:
            import openai  # noqa: F401  fails here, and not in the first delegation
        except ImportError:
            raise UsageError("endpoints need the `openai` package", fix="pip install 'tmlc[background]'") from None
        self._url, self._name, self._key, self._api = url, name, key, api
        self._tools, self._images, self._max_tokens = tools, images, max_tokens
        self._client: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        return f"EndpointModel({self._name!r}, api={self._api.value!r})"

    async def run(self, delegation: Delegation, context: Context) -> AsyncIterator[Event]:
        import openai

        tools = await self._tools.tools() if self._tools is not None else []
        history = self._opening(delegation, context)
        try:
            for number in range(MAX_ROUNDS + 1):
                heard = await self._ask(history, tools if number < MAX_ROUNDS else [], context)
                if not heard.calls:
                    break
                if number == MAX_ROUNDS or self._tools is None:
                    raise BackgroundError(
                        "the endpoint goes on calling tools, or calls some that it was not offered",
                        fix=f"say in `instructions` to answer after at most {MAX_ROUNDS} rounds, or name another model",
                    )
                for call in heard.calls.values():
                    yield ToolCall(call.name, call.arguments)
                yield Progress(f"Asking {', '.join(call.name for call in heard.calls.values())}.")
                await self._run_tools(history, heard)
        except openai.APIStatusError as error:
            # Its message may quote the request: only the number is told.
            raise BackgroundError(
                f"the endpoint answered {error.status_code}", fix=_STATUS.get(error.status_code, _LOOK)
            ) from None
        except openai.OpenAIError as error:
            raise BackgroundError(
                f"the endpoint failed: {type(error).__name__}", fix="see that it runs and that `url` leads there"
            ) from None
        if not heard.text.strip():
            raise BackgroundError("the endpoint gave an empty answer", fix="raise `max_tokens`, or name another model")
        yield Result(heard.text.strip())

    async def close(self) -> None:
        if self._tools is not None:
            await self._tools.close()
        if self._client is not None and self._loop is asyncio.get_running_loop():
            await self._client.close()

    def _ready(self) -> Any:
        """The client of the running loop; its connections belong to the loop that made them."""
        import openai

        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            self._loop = loop
            self._client = openai.AsyncOpenAI(
                # The package takes a key from the environment when it gets none: an endpoint must not see that one.
                base_url=self._url, api_key=self._key or "none", timeout=REQUEST_SECONDS, max_retries=RETRIES,
                organization="", project="", http_client=capped(openai.DefaultAsyncHttpxClient),
            )  # fmt: skip
        return self._client

    def _opening(self, delegation: Delegation, context: Context) -> list[dict[str, Any]]:
        """The conversation and the task, in the form of the interface."""
        text = user_text(delegation, context)
        pictures = [data_url(frame) for frame in context.frames] if self._images else []
        content: Any = text
        if self._api is Api.CHAT:
            if pictures:
                shown = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
                content = [{"type": "text", "text": text}, *shown]
            return [{"role": "system", "content": system_text(context)}, {"role": "user", "content": content}]
        if pictures:
            shown = [{"type": "input_image", "image_url": url, "detail": "auto"} for url in pictures]
            content = [{"type": "input_text", "text": text}, *shown]
        return [{"role": "user", "content": content}]

    async def _ask(self, history: list[dict[str, Any]], tools: list[Tool], context: Context) -> _Round:
        """One answer; reading ends where more would never be used, and the connection with it."""
        heard = _Round()
        if self._api is Api.CHAT:
            await self._ask_chat(history, tools, heard)
        else:
            await self._ask_responses(history, tools, context, heard)
        return heard

    async def _ask_chat(self, history: list[dict[str, Any]], tools: list[Tool], heard: _Round) -> None:
        options: dict[str, Any] = {}
        if tools:
            options["tools"] = [
                {"type": "function",
                 "function": {"name": tool.name, "description": tool.description, "parameters": tool.schema}}
                for tool in tools
            ]  # fmt: skip
        if self._max_tokens is not None:
            options["max_completion_tokens"] = self._max_tokens
        stream = await self._ready().chat.completions.create(
            model=self._name, messages=history, stream=True, **options
        )
        async with stream:
            async for chunk in stream:
                if not chunk.choices:
                    continue
                delta = chunk.choices[0].delta
                heard.text += delta.content or ""
                for piece in delta.tool_calls or ():
                    call = heard.call(piece.index)
                    if call is not None:
                        call.id = call.id or piece.id or ""
                        if piece.function is not None:
                            call.name += piece.function.name or ""
                            call.extend(piece.function.arguments or "")
                if len(heard.text) > MAX_CHARACTERS:
                    return

    async def _ask_responses(
        self, history: list[dict[str, Any]], tools: list[Tool], context: Context, heard: _Round
    ) -> None:
        options: dict[str, Any] = {}
        if tools:
            options["tools"] = [
                {"type": "function", "name": tool.name, "description": tool.description,
                 "parameters": tool.schema, "strict": False}
                for tool in tools
            ]  # fmt: skip
        if self._max_tokens is not None:
            options["max_output_tokens"] = self._max_tokens
        stream = await self._ready().responses.create(
            model=self._name, input=history, instructions=system_text(context), stream=True, store=False, **options
        )
        async with stream:
            async for event in stream:
                if event.type == "response.output_text.delta":
                    heard.text += event.delta
                elif event.type == "response.output_item.done" and event.item.type == "function_call":
                    call = heard.call(event.item.call_id)
                    if call is not None:
                        call.id, call.name = event.item.call_id, event.item.name
                        call.extend(event.item.arguments)
                elif event.type in ("response.failed", "error"):
                    raise BackgroundError("the endpoint failed in the middle of its answer", fix=_LOOK)
                if len(heard.text) > MAX_CHARACTERS:
                    return

    async def _run_tools(self, history: list[dict[str, Any]], heard: _Round) -> None:
        """Runs what was called, all at once, and puts calls and results into the history."""
        assert self._tools is not None
        calls = list(heard.calls.values())
        if any(not call.name or not call.id for call in calls):
            raise BackgroundError(
                "the endpoint called a tool without its name or id", fix="name another model, or leave `tools` out"
            )
        given = await asyncio.gather(*(self._tools.call(call.name, call.arguments) for call in calls[:MAX_CALLS]))
        given += ["error: too many calls at once"] * (len(calls) - len(given))
        if self._api is Api.CHAT:
            asked = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
            history.append({"role": "assistant", "content": heard.text or None, "tool_calls": asked})
            for call, text in zip(calls, given, strict=True):
                history.append({"role": "tool", "tool_call_id": call.id, "content": text})
            return
        for call, text in zip(calls, given, strict=True):
            history.append(
                {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": call.arguments}
            )
            history.append({"type": "function_call_output", "call_id": call.id, "output": text})
