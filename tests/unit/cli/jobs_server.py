"""A head that takes jobs, as far as ``raylit submit`` sees one: Ray's REST API over what a test has decided."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from aiohttp import WSCloseCode, web


class JobsServer:
    """``url`` answers while the body runs. The attributes are read at each request; ``job`` is what was submitted."""

    def __init__(self, version: str, token: str | None = None) -> None:
        self.version, self.token = version, token
        self.log = "hello\n"
        self.status, self.exit_code, self.message = "SUCCEEDED", 0, None
        self.running = threading.Event()  # while it is set the job goes on
        self.on_tail: Callable[[], None] = lambda: None  # called once the log so far was sent
        self.breaks: list[int] = []  # the log's connection is cut after so many characters, once for each
        self.lingers = False  # the log's connection stays after the job's end
        self.down = False  # every request is answered with 503
        self.packages: dict[str, bytes] = {}
        self.job: dict[str, Any] = {}
        self.stopped: list[str] = []
        self.requests: list[str] = []
        self.refuses: str | None = None  # what a submission is answered with
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> JobsServer:
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:  # fmt: skip
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(60)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _serve(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(middlewares=[self._guard], client_max_size=10**9)
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/packages/{protocol}/{name}", self._has_package)
        app.router.add_put("/api/packages/{protocol}/{name}", self._put_package)
        app.router.add_post("/api/jobs/", self._submit)
        app.router.add_get("/api/jobs/{job}", self._info)
        app.router.add_get("/api/jobs/{job}/logs", self._logs)
        app.router.add_get("/api/jobs/{job}/logs/tail", self._tail)
        app.router.add_post("/api/jobs/{job}/stop", self._stop)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self._ready.set()
        await self._end.wait()
        await runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path}")
        if self.down:
            return web.Response(status=503, text="starting")
        shown = request.headers.get("Authorization")
        if self.token is not None and shown is None:
            return web.Response(status=401, text="Unauthorized: Missing authentication token")
        if self.token is not None and shown != f"Bearer {self.token}":
            return web.Response(status=403, text="Forbidden: Invalid authentication token")
        return await handler(request)

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": self.version, "ray_commit": "", "session_name": "s"})

    async def _has_package(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if request.match_info["name"] in self.packages else 404)

    async def _put_package(self, request: web.Request) -> web.Response:
        self.packages[request.match_info["name"]] = await request.read()
        return web.Response()

    async def _submit(self, request: web.Request) -> web.Response:
        if self.refuses is not None:
            return web.Response(status=500, text=self.refuses)
        self.job = json.loads(await request.text())
        return web.json_response({"job_id": "1", "submission_id": self.job["submission_id"]})

    async def _info(self, request: web.Request) -> web.Response:
        if request.match_info["job"] != self.job.get("submission_id"):
            return web.Response(status=404, text=f"Job {request.match_info['job']} does not exist")
        goes_on = self.running.is_set()
        return web.json_response({
            "type": "SUBMISSION", "entrypoint": self.job["entrypoint"], "status": "RUNNING" if goes_on else self.status,
            "message": self.message, "driver_exit_code": None if goes_on else self.exit_code,
        })  # fmt: skip

    async def _logs(self, request: web.Request) -> web.Response:
        return web.json_response({"logs": self.log})

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        at, told = 0, False
        while True:
            text = self.log[at:]
            if self.breaks and len(self.log) >= self.breaks[0]:
                await socket.send_str(self.log[at : self.breaks.pop(0)])
                request.transport.abort()  # type: ignore[union-attr]
                return socket
            goes_on = self.running.is_set()
            if text:
                await socket.send_str(text)
                at += len(text)
            elif not goes_on and not self.lingers:
                await socket.close(code=WSCloseCode.OK)
                return socket
            if not told:
                told = True
                self.on_tail()
            await asyncio.sleep(0.01)

    async def _stop(self, request: web.Request) -> web.Response:
        self.stopped.append(request.match_info["job"])
        self.status, self.exit_code = "STOPPED", None
        self.running.clear()
        return web.json_response({"stopped": True})
