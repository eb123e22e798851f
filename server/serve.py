"""The life of one server process: listen, load, serve, drain, stop.

The port is open from the first moment, so that probes can tell loading from dead. SIGTERM or SIGINT starts a drain:
/health answers 503, nothing new is taken, what runs gets `graceful_timeout_s` to finish. A second signal ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from adapters_store.record import VersionState
from server.api.app import create_app
from server.api.service import Service
from server.front.errors import CannotStart
from server.front.front import Front
from server.keys import KeysFileError, read_keys
from server.progress import Progress, ready_lines
from server.settings import Settings
from server.usage import UsageLedger

STOPPED_AT_ONCE = 1
STARTUP_FAILED = 3
_BACKLOG = 2048
log = logging.getLogger("veneer.serve")


def serve(settings: Settings) -> int:
    """Serve until a signal; the exit status of the process."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    if settings.log_level == "info":  # what uvicorn says of starting and stopping is said better here
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
    _allow_many_connections()
    if not (settings.is_loopback or settings.api_key or settings.keys_file):
        log.warning("no API key is set: whoever reaches %s may generate. Set one with --api-key.", settings.bind_host)
    try:
        if settings.keys_file is not None:
            read_keys(settings.keys_file)
    except KeysFileError as error:
        print(f"veneer: {error}", file=sys.stderr)
        return STARTUP_FAILED
    with contextlib.ExitStack() as opened:
        listeners = []
        for port in (settings.port, settings.admin_port):
            try:
                listeners += [] if port is None else [opened.enter_context(listen(settings.bind_host, port))]
            except OSError as error:
                print(
                    f"veneer: cannot listen on {settings.bind_host}:{port}: {error.strerror}. "
                    "Choose another address with --port, --admin-port or --host.",
                    file=sys.stderr,
                )
                return STARTUP_FAILED
        return asyncio.run(_run(settings, listeners))


def _allow_many_connections() -> None:
    """Raise the soft limit of open files to the hard one: each connection is a file, and 1,024 are soon used up."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG)


class _Server(uvicorn.Server):
    """uvicorn's server without its own signals: a signal here means drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _run(settings: Settings, listeners: list[socket.socket]) -> int:
    """Serve on the listeners, the first of which is told to people."""
    app = create_app(settings)
    service: Service = app.state.service
    server = _Server(_uvicorn_config(settings, app))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, stop)
    serving = asyncio.create_task(server.serve(sockets=listeners))
    progress = Progress(sys.stderr)
    starting = asyncio.create_task(_start(settings, progress))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([starting, stopping, serving], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return 0
        front = starting.result()
        if settings.usage_ledger:
            service.ledger = UsageLedger(settings.store_path / "usage")
    except (CannotStart, OSError, ValueError) as error:
        service.fail(str(error))
        print(f"veneer: could not start: {error}", file=sys.stderr)
        return STARTUP_FAILED
    else:
        service.attach(front)
        port = listeners[0].getsockname()[1]
        shown = [record.name for record in front.library.page(limit=2, state=VersionState.READY).records]
        num_adapters = front.library.num_by_state()[VersionState.READY]
        print("\n".join(ready_lines(settings, shown, num_adapters, port, progress.total_s)), flush=True)
        await asyncio.wait([stopping, serving], return_when=asyncio.FIRST_COMPLETED)
        log.info("stopping; requests in the house: %d, they get %g s", service.in_house, settings.graceful_timeout_s)
        if not await service.drain(settings.graceful_timeout_s):
            log.warning("%d requests did not finish in time and are aborted", service.in_house)
        await front.close()
        return 0
    finally:
        stopping.cancel()
        server.should_exit = True
        await asyncio.gather(stopping, serving, return_exceptions=True)
        if service.ledger is not None:
            await asyncio.to_thread(service.ledger.close)


def _on_signal(stop: asyncio.Event) -> None:
    if stop.is_set():
        print("veneer: a second signal; stopping at once", file=sys.stderr, flush=True)
        os._exit(STOPPED_AT_ONCE)  # the workers end when their channel does, the store is crash-safe
    stop.set()


async def _start(settings: Settings, progress: Progress) -> Front:
    return await Front.start(settings, on_event=progress.on_event)


def _uvicorn_config(settings: Settings, app: object) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        loop="auto",
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        root_path=settings.root_path,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_certfile=settings.ssl_certfile,
        timeout_graceful_shutdown=1,
        timeout_keep_alive=75,
        h11_max_incomplete_event_size=64 * 1024,
    )
