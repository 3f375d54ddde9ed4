"""A real HTTP server that speaks the chat protocol, with faults on purpose."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from potstill.compress.generate import Record, journal_of

Ask = Callable[..., Record]
"""Asks for answers to prompts (texts, or a dict for each row) with settings of `ApiTeacher`, into out.jsonl."""


@dataclass
class Says:
    """What the server does with a request: wait, then send a status with headers and a body, or cut the connection."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    after: float = 0.0
    cut: bool = False


@dataclass
class Seen:
    """A request as it came."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    at: float

    @property
    def prompt(self) -> str:
        return str(self.body["prompt"] if "prompt" in self.body else self.body["messages"][-1]["content"])


def completion(text: str | None, **more: Any) -> dict[str, Any]:
    """The body of an answer; `message`, `finish_reason`, `usage` and `model` can be given."""
    message = {"role": "assistant", "content": text} | more.pop("message", {})
    choice = {"index": 0, "message": message, "finish_reason": more.pop("finish_reason", "stop")}
    return {"model": "big-1", "choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 5}} | more


class Service:
    """The server: `answer` decides what it says to each request; `seen` holds what came."""

    def __init__(self) -> None:
        self.answer: Callable[[Seen], Says] = lambda seen: Says(completion(f"about {seen.prompt}"))
        self.seen: list[Seen] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer._serve(self)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:  # a client that was killed
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def hold_until(self, count: int) -> None:
        """Wait until so many requests came."""
        for _ in range(4000):
            if len(self.seen) >= count:
                return
            time.sleep(0.005)
        raise AssertionError(f"{len(self.seen)} requests came, and not {count}")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        seen = Seen(handler.path, body, {k.lower(): v for k, v in handler.headers.items()}, time.monotonic())
        with self._lock:
            self.seen.append(seen)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            says = self.answer(seen)
            time.sleep(says.after)
        finally:
            with self._lock:
                self._at_once -= 1
        if says.cut:
            handler.close_connection = True
            return
        data = says.body if isinstance(says.body, bytes) else json.dumps(says.body).encode()
        handler.send_response(says.status)
        for name, value in ({"Content-Length": str(len(data))} | says.headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal_of(folder / "out.jsonl").read_text().splitlines()]
