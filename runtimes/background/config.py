"""The settings of the background room, `background.yaml`: strict, without secrets in it.

    model: {kind: endpoint, url: http://127.0.0.1:8000/v1, name: thinker, key_env: THINKER_KEY}
    instructions: Answer in one sentence.
    tools:
      - {name: files, command: [python, files_server.py]}
      - {name: web, url: https://tools.example/mcp, key_env: TOOLS_KEY}
    rules:
      - {every: 60 s, inject: "{time} of the session have passed.", supersede: clock}

Keys stand in the environment and are named here. An unknown word is an error, with its place.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from tmlc.errors import UsageError, first_problem
from tmlc.runtimes.background.delegations import Limits
from tmlc.runtimes.background.detectors import Detector
from tmlc.runtimes.background.endpoint import Api, EndpointModel
from tmlc.runtimes.background.engine_model import NICENESS, EngineModel
from tmlc.runtimes.background.mcp_tools import ToolBox, ToolServer
from tmlc.runtimes.background.model import BackgroundModel
from tmlc.runtimes.background.policies import Marks, Policy
from tmlc.runtimes.background.rules import MAX_RULES, Milliseconds, Rule
from tmlc.runtimes.background.session import Background
from tmlc.runtimes.core.engine import load
from tmlc.yaml_text import YamlFault, parse_yaml

_LIMITS, _MARKS = Limits(), Marks()
MAX_FILE = 1 << 20
"""Bytes of a settings file."""
SEE = "see docs/background.md"


def _plain_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("a URL begins with http:// or https:// and names a host")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("a URL here has no user, password, query or fragment: keys belong into the environment")
    return url


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", name):
        raise ValueError("not the name of an environment variable")
    return name


Url = Annotated[str, AfterValidator(_plain_url)]
Variable = Annotated[str, AfterValidator(_variable)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class _Keyed(_Strict):
    """Something with a URL and a key: a key never travels unencrypted, except on this machine."""

    key_env: Variable | None = None

    def key(self, environ: Mapping[str, str], url: str) -> str | None:
        if self.key_env is None:
            return None
        if not environ.get(self.key_env):
            raise UsageError(
                f"the environment variable {self.key_env} is not set", where="key_env", fix="put the key into it"
            )
        if urlsplit(url).scheme == "http" and not _here(urlsplit(url).hostname or ""):
            raise UsageError(
                f"the key in {self.key_env} would go unencrypted to another machine", where="url", fix="use https://"
            )
        return environ[self.key_env]


class EndpointSettings(_Keyed):
    """An OpenAI-compatible endpoint; see `EndpointModel`."""

    kind: Literal["endpoint"]
    url: Url
    name: str = Field(min_length=1, max_length=200)
    api: Api = Api.CHAT
    images: bool = False
    max_tokens: int | None = Field(None, ge=1, le=100_000)


class EngineSettings(_Strict):
    """A second package on this machine; see `EngineModel`."""

    kind: Literal["engine"]
    package: Path
    target: str | None = None
    threads: int = Field(1, ge=1, le=256)
    max_tokens: int = Field(256, ge=1, le=100_000)
    niceness: int = Field(NICENESS, ge=0, le=19)


class ToolSettings(_Keyed):
    """An MCP server: a command of this machine, or a URL."""

    name: str = Field(pattern=r"^[A-Za-z0-9_]{1,24}$")
    command: list[str] = Field(default_factory=list, max_length=64)
    url: Url | None = None
    env: list[Variable] = Field(default_factory=list, max_length=64)

    @model_validator(mode="after")
    def _one(self) -> ToolSettings:
        if bool(self.command) == bool(self.url):
            raise ValueError("a tool server has either `command` or `url`")
        if self.url and self.env:
            raise ValueError("`env` names variables that a command gets")
        if self.command and self.key_env:
            raise ValueError("a command gets its keys by `env`")
        return self

    def make(self, environ: Mapping[str, str]) -> ToolServer:
        """The server, with what the environment holds for it."""
        if self.url:
            key = self.key(environ, self.url)
            return ToolServer(self.name, url=self.url, headers={"Authorization": f"Bearer {key}"} if key else {})
        missing = [name for name in self.env if name not in environ]
        if missing:
            what = f"the environment variable {missing[0]} is not set"
            raise UsageError(what, where=f"tools, {self.name}", fix="set it, or leave it out of `env`")
        return ToolServer(self.name, tuple(self.command), env={name: environ[name] for name in self.env})


class LimitSettings(_Strict):
    """See `Limits`."""

    live: int = Field(4, ge=1, le=4)
    timeout: Milliseconds = 120_000
    progress_after: Milliseconds = 8_000
    spoken: bool = True
    policy: Policy = Policy.WHEN_IDLE
    progress_spoken: bool = False
    progress_text: str = Field(_LIMITS.progress_text, min_length=1, max_length=400)

    @model_validator(mode="after")
    def _possible(self) -> LimitSettings:
        if not 1_000 <= self.timeout <= 120_000 or self.progress_after < 1_000:
            raise ValueError("timeout is 1 to 120 s, progress_after at least 1 s")
        return self

    def make(self) -> Limits:
        return Limits(
            self.live, self.timeout / 1000, self.progress_after / 1000, self.spoken, self.policy,
            self.progress_spoken, self.progress_text,
        )  # fmt: skip


class MarkSettings(_Strict):
    """See `Marks`."""

    injection: str = _MARKS.injection
    end_of_injection: str = _MARKS.end_of_injection
    delegation: str = _MARKS.delegation
    end_of_delegation: str = _MARKS.end_of_delegation


class BackgroundSettings(_Strict):
    """The whole file."""

    model: Annotated[EndpointSettings | EngineSettings, Field(discriminator="kind")] | None = None
    instructions: str = Field("", max_length=8_000)
    tools: list[ToolSettings] = Field(default_factory=list, max_length=16)
    rules: list[Rule] = Field(default_factory=list, max_length=MAX_RULES)
    limits: LimitSettings = Field(default_factory=lambda: LimitSettings.model_validate({}))
    marks: MarkSettings = Field(default_factory=lambda: MarkSettings.model_validate({}))

    @model_validator(mode="after")
    def _tools_have_a_model(self) -> BackgroundSettings:
        if self.tools and not isinstance(self.model, EndpointSettings):
            raise ValueError("`tools` are for a model of kind `endpoint`")
        return self

    def make(
        self,
        *,
        first_target: str,
        environ: Mapping[str, str] | None = None,
        detectors: Mapping[str, Detector] | None = None,
        preempted: Callable[[], bool] | None = None,
    ) -> Background:
        """The background of a server.

        Args:
            first_target: target of the engine that the sessions run on.
            environ: where the keys are; None is this process's environment.
            detectors, preempted: see `Background`.

        Raises UsageError: a key that is not there or would travel unencrypted, a rule that cannot work, a package
            (of kind `engine`) that cannot be used.
        """
        model = self._model(os.environ if environ is None else environ, first_target)
        return Background(
            model, limits=self.limits.make(), marks=Marks(**self.marks.model_dump()), instructions=self.instructions,
            rules=self.rules, detectors=detectors, preempted=preempted,
        )  # fmt: skip

    def _model(self, environ: Mapping[str, str], first_target: str) -> BackgroundModel | None:
        chosen = self.model
        if chosen is None:
            return None
        if isinstance(chosen, EndpointSettings):
            tools = ToolBox([tool.make(environ) for tool in self.tools]) if self.tools else None
            return EndpointModel(
                chosen.url, chosen.name, key=chosen.key(environ, chosen.url), api=chosen.api, tools=tools,
                images=chosen.images, max_tokens=chosen.max_tokens,
            )  # fmt: skip
        package, target, threads = chosen.package, chosen.target, chosen.threads
        engine = EngineModel(
            lambda: load(package, target=target, threads=threads, sessions=1),
            first_target=first_target, max_tokens=chosen.max_tokens, niceness=chosen.niceness,
        )  # fmt: skip
        engine.ready()
        return engine


def read_settings(path: str | Path) -> BackgroundSettings:
    """The settings in a YAML (or JSON) file.

    Raises UsageError: unreadable, no mapping, unknown or missing or wrong entries; the message names the first of them,
    and never quotes a value.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        if len(data) > MAX_FILE:
            raise UsageError("the settings are longer than any should be", where=str(path), fix=SEE)
        given: Any = parse_yaml(data)
    except OSError as error:
        what = f"the settings cannot be read: {error.strerror}"
        raise UsageError(what, where=str(path), fix="check the path") from None
    except YamlFault as error:  # what it says may quote a secret
        raise UsageError("the settings are not YAML", where=error.within(path), fix=SEE) from None
    return check_settings(given if given is not None else {}, str(path))


def check_settings(given: Any, where: str) -> BackgroundSettings:
    """The settings in a mapping. Raises UsageError as `read_settings` does."""
    try:
        return BackgroundSettings.model_validate(given)
    except ValidationError as error:
        raise UsageError(first_problem(error, "the file"), where=where, fix=SEE) from None


def _here(host: str) -> bool:
    """Is this name or address this machine's own?"""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
