"""Endpoints as background models: the real `openai` client against a server on loopback, a good one and bad ones."""

import asyncio
import base64
import gzip
import io
import json
import logging

import numpy as np
import pytest
from aiohttp import web
from PIL import Image

from tmlc.errors import BackgroundError
from tmlc.runtimes.background.capped_http import MAX_BODY, MAX_LINE
from tmlc.runtimes.background.delegations import Limits, Stage
from tmlc.runtimes.background.endpoint import MAX_CALLS, MAX_ROUNDS, Api, EndpointModel
from tmlc.runtimes.background.injections import CUT_MARK, MAX_CHARACTERS, MAX_TOKENS
from tmlc.runtimes.background.mcp_tools import Tool, ToolBox
from tmlc.runtimes.background.model import Context, Delegation, Frame, Line, Origin, Progress, Result, ToolCall

from .endpoint_server import chat_calls, chat_chunk, chat_text, responses_calls, responses_text, serve
from .test_delegations import Beside

SAYS = {Api.CHAT: chat_text, Api.RESPONSES: responses_text}
CALLS = {Api.CHAT: chat_calls, Api.RESPONSES: responses_calls}
TASK = Delegation("dlg_1", "Will it rain?", 30, 6000, Origin.TOKEN)
LINES = (Line("user", "hello", 0, 900), Line("model", "hi", 62_000, 62_900))
TALK = Context(LINES, instructions="You know Bern.", cut=3)
TOLD = ("You know Bern.", "[0:00] user: hello", "[1:02] model: hi", "until 0:06", "Task: Will it rain?", "3 older")


class Adder(ToolBox):
    """A tool box without servers: one tool, in this process."""

    def __init__(self) -> None:
        super().__init__(())
        self.called = []

    async def tools(self):
        return [Tool("m__add", "Adds.", {"type": "object", "properties": {"a": {"type": "integer"}}})]

    async def call(self, name, arguments):
        self.called.append((name, arguments))
        return "5"


async def collect(model, context=TALK):
    return [event async for event in model.run(TASK, context)]


def ask(answers, api=Api.CHAT, context=TALK, **options):
    """The events of one delegation, and the endpoint as it is afterwards."""

    async def main():
        async with serve() as endpoint:
            endpoint.answers = answers
            model = EndpointModel(endpoint.url, "thinker", api=api, **options)
            try:
                return await collect(model, context), endpoint
            finally:
                await model.close()

    return asyncio.run(main())


@pytest.mark.parametrize("api", Api)
def test_a_streamed_answer_is_the_result(api, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-somebody-else")
    events, endpoint = ask([lambda body: SAYS[api]("Rain from noon. Ünglaublich.")], api)
    assert events == [Result("Rain from noon. Ünglaublich.")]
    (body,), (headers,) = endpoint.asked, endpoint.headers
    assert body["model"] == "thinker" and body["stream"] is True and "tools" not in body
    assert endpoint.paths == ["/v1/chat/completions" if api is Api.CHAT else "/v1/responses"]
    assert "somebody" not in json.dumps(headers)  # neither key nor organisation of the environment leaves
    told = json.dumps(body)
    assert all(part in told for part in TOLD)
    assert api is Api.CHAT or body["store"] is False


@pytest.mark.parametrize("api", Api)
def test_tools_are_offered_called_and_their_results_fed_back(api):
    tools = Adder()
    answers = [lambda body: CALLS[api](("m__add", '{"a": 2}'), ("m__add", '{"a": 3}')), lambda body: SAYS[api]("Five.")]
    events, endpoint = ask(answers, api, tools=tools)
    assert events[-1] == Result("Five.") and [type(e) for e in events[:3]] == [ToolCall, ToolCall, Progress]
    assert tools.called == [("m__add", '{"a": 2}'), ("m__add", '{"a": 3}')]
    first, second = endpoint.asked
    assert "m__add" in json.dumps(first["tools"])
    history = second["messages"] if api is Api.CHAT else second["input"]
    if api is Api.CHAT:
        assert [m["role"] for m in history] == ["system", "user", "assistant", "tool", "tool"]
        assert [m["tool_call_id"] for m in history[3:]] == ["call_0", "call_1"] and history[3]["content"] == "5"
        assert history[2]["tool_calls"][1]["function"] == {"name": "m__add", "arguments": '{"a": 3}'}
    else:
        kinds = [item.get("type") for item in history[1:]]
        assert kinds == ["function_call", "function_call_output"] * 2 and history[2]["output"] == "5"


@pytest.mark.parametrize("api", Api)
def test_rounds_are_bounded_and_the_last_one_offers_no_tools(api):
    tools = Adder()
    answers = [lambda body: CALLS[api](("m__add", "{}"))]
    with pytest.raises(BackgroundError, match=r"goes on calling tools.*\n  .*`instructions` .* at most 8 rounds"):
        ask(answers, api, tools=tools)
    assert len(tools.called) == MAX_ROUNDS

    def gives_in(body):
        return CALLS[api](("m__add", "{}")) if "tools" in body else SAYS[api]("I do not know.")

    events, endpoint = ask([gives_in], api, tools=Adder())
    assert events[-1] == Result("I do not know.") and len(endpoint.asked) == MAX_ROUNDS + 1


@pytest.mark.parametrize("api", Api)
def test_a_round_with_too_many_calls_has_errors_for_the_rest(api):
    tools = Adder()
    answers = [lambda body: CALLS[api](*[("m__add", "{}")] * 50), lambda body: SAYS[api]("ok")]
    events, endpoint = ask(answers, api, tools=tools)
    assert events[-1] == Result("ok") and len(tools.called) == MAX_CALLS
    assert json.dumps(endpoint.asked[1]).count("too many calls") == 1


@pytest.mark.parametrize("api", Api)
def test_pictures_go_along_when_the_endpoint_sees(api):
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    context = Context(frames=(Frame(pixels, 0),))
    _, endpoint = ask([lambda body: SAYS[api]("a cat")], api, context, images=True)
    text = json.dumps(endpoint.asked[0])
    encoded = text.split("data:image/png;base64,")[1].split('"')[0]
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))) == pixels).all()
    _, endpoint = ask([lambda body: SAYS[api]("a cat")], api, context)
    assert "image" not in json.dumps(endpoint.asked[0])


def test_an_answer_without_end_is_read_until_it_is_long_enough():
    def endless(body):
        while True:
            yield chat_chunk({"content": "x" * 1000})

    events, _ = ask([endless])
    assert MAX_CHARACTERS < len(events[0].text) <= MAX_CHARACTERS + 1000


@pytest.mark.parametrize(
    "answer",
    [
        lambda body: [b"data: " + b"x" * (MAX_LINE + 70_000)],  # a line without end
        lambda body: [b": x\n" * 20_000] * (MAX_BODY // 80_000 + 2),  # a body without end
        lambda body: web.Response(body=gzip.compress(b"\n" * 10_000_000), headers={"Content-Encoding": "gzip"}),
        lambda body: web.Response(status=500, text="the key sk-secret is wrong"),
        lambda body: web.Response(status=401, text="no"),
        lambda body: [b"data: {not json\n\n"],
        lambda body: [b"data: 17\n\n"],
        lambda body: [b'data: {"choices": [{"delta": {"content": 5}}]}\n\n'],
        lambda body: [b'data: {"choices": "no"}\n\n'],
        lambda body: [b"\xff\xfe\n\n"],
        lambda body: chat_text("  \n "),
        lambda body: [],
        lambda body: chat_calls(("m__add", "{}")),  # which nobody offered
    ],
)
def test_a_bad_answer_fails_the_delegation_and_tells_no_secret(answer, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr("tmlc.runtimes.background.endpoint.RETRIES", 0)

    async def main():
        async with serve() as endpoint:
            endpoint.answers = [answer]
            beside = Beside(tokenizer, EndpointModel(endpoint.url, "thinker", key="sk-secret"))
            beside.session.delegate("go")
            await beside.ended()
            await beside.close()
            return beside, endpoint

    with caplog.at_level(logging.DEBUG):
        beside, endpoint = asyncio.run(main())
    assert beside.stages()[-1] is Stage.FAILED and "sk-secret" not in beside.events[-1].text
    assert endpoint.headers[0]["authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in caplog.text and "sk-secret" not in repr(beside.shared.model)


@pytest.mark.parametrize("event", [{"type": "response.failed", "response": {}}, {"type": "error", "message": "x"}])
def test_an_answer_of_the_responses_interface_that_fails_midway_is_a_failure(event):
    with pytest.raises(BackgroundError, match="middle of its answer\n  see the endpoint's own log"):
        ask([lambda body: [*list(responses_text("Rai"))[:1], event]], Api.RESPONSES)


@pytest.mark.parametrize(
    ("status", "fix"),
    [(401, "key_env"), (403, "key_env"), (404, "`url` and `name`"), (429, "`live`"), (503, "own log")],
)
def test_a_status_says_what_to_do_about_it(status, fix, monkeypatch):
    monkeypatch.setattr("tmlc.runtimes.background.endpoint.RETRIES", 0)
    with pytest.raises(BackgroundError, match=f"answered {status}\n") as error:
        ask([lambda body: web.Response(status=status, text="the key sk-secret is wrong")], Api.CHAT)
    assert fix in error.value.fix and "sk-secret" not in str(error.value)


def test_an_empty_answer_and_a_call_without_a_name_are_failures():
    with pytest.raises(BackgroundError, match="empty answer\n  raise `max_tokens`"):
        ask([lambda body: chat_text("  ")], Api.CHAT)
    with pytest.raises(BackgroundError, match=r"without its name or id\n  .*`tools`"):
        ask([lambda body: chat_calls(("", "{}"))], Api.CHAT, tools=Adder())


def test_an_endpoint_that_is_not_there_is_a_failure(monkeypatch):
    monkeypatch.setattr("tmlc.runtimes.background.endpoint.RETRIES", 0)
    with pytest.raises(BackgroundError, match="APIConnectionError\n  see that it runs and that `url` leads there"):
        asyncio.run(collect(EndpointModel("http://127.0.0.1:9/v1", "thinker")))


def test_an_endpoint_that_hangs_is_left_at_the_timeout(tokenizer):
    async def main():
        async with serve() as endpoint:
            endpoint.answers = [lambda body: [chat_chunk({"content": "Wai"}), None]]
            beside = Beside(tokenizer, EndpointModel(endpoint.url, "thinker"), Limits(timeout=0.5))
            beside.session.delegate("go")
            await beside.ended()
            assert beside.stages()[-1] is Stage.TIMEOUT
            await beside.close()

    asyncio.run(main())


def test_ten_megabytes_from_an_endpoint_are_an_injection_of_the_usual_size(tokenizer):
    async def main():
        async with serve() as endpoint:
            endpoint.answers = [lambda body: [chat_chunk({"content": "é" * 5000})] * 1000]
            beside = Beside(tokenizer, EndpointModel(endpoint.url, "thinker"))
            beside.session.delegate("go", spoken=False)
            await beside.ended()
            beside.edges.edges(60)
            tokens = [t for d in beside.edges.deliveries for t in d.inject if t < 256]
            assert len(tokens) <= MAX_TOKENS and bytes(tokens).decode().endswith(CUT_MARK)
            await beside.close()

    asyncio.run(main())
