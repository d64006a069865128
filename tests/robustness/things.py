"""What the rows need: folders, files, a tiny reward and its scorer, made when first asked for."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from airl_fast import RewardScorer, cli
from airl_fast.discriminator import Discriminator
from airl_fast.policy import Policy
from tests.robustness.table import Answered, CommandRefused
from tests.tiny_reward import save_reward


class Things:
    """Shared by all rows; nothing in it is changed by one."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self._numbers = count()

    def folder(self) -> Path:
        """A fresh, empty folder."""
        made = self.base / f"folder-{next(self._numbers)}"
        made.mkdir()
        return made

    def file(self, content: str | bytes, name: str = "rows.jsonl") -> Path:
        """A fresh file."""
        made = self.folder() / name
        made.write_bytes(content if isinstance(content, bytes) else content.encode())
        return made

    def rows(self, *rows: Any, name: str = "rows.jsonl") -> Path:
        """A fresh file of JSON lines."""
        return self.file("".join(json.dumps(row) + "\n" for row in rows), name)

    @cached_property
    def reward(self) -> Path:
        """A run's folder with reward/ and policy/."""
        made = self.folder()
        return save_reward(made)

    @cached_property
    def scorer(self) -> RewardScorer:
        """The reward with its policy."""
        return RewardScorer.from_pretrained(self.reward)

    @cached_property
    def lone(self) -> RewardScorer:
        """The reward alone."""
        return RewardScorer.from_pretrained(self.reward / "reward")

    @property
    def policy(self) -> Policy:
        """The policy."""
        assert isinstance(self.scorer.policy, Policy)
        return self.scorer.policy

    @property
    def discriminator(self) -> Discriminator:
        """The discriminator."""
        return self.scorer.discriminator

    @cached_property
    def app(self) -> Any:
        """The server."""
        from airl_fast.integrations.rewards import RewardReader
        from airl_fast.serving.app import Limits, make_app

        return make_app(RewardReader(scorer=self.scorer), limits=Limits(request_bytes=4000))

    def command(self, *arguments: object) -> None:
        """Run ``airl-fast``; what it refuses is raised."""
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            try:
                status = cli.main([str(argument) for argument in arguments])
            except SystemExit as stop:  # argparse
                status = stop.code
        if status == 2:
            raise CommandRefused(errors.getvalue())
        assert status == 0, (status, errors.getvalue())

    def ask(self, path: str, body: Any, method: str = "POST") -> Any:
        """Send a request; an answer from 400 on is raised."""
        import httpx

        async def run() -> Any:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                kind = "content" if isinstance(body, bytes) else "json"
                return await client.request(method, path, **{kind: body})

        response = asyncio.run(run())
        if response.status_code >= 400:
            raise Answered(f"{response.status_code}: {response.json()['error']['message']}")
        return response.json()


@pytest.fixture(scope="session")
def things(tmp_path_factory: pytest.TempPathFactory) -> Things:
    """The one set of things."""
    return Things(tmp_path_factory.mktemp("robustness"))
