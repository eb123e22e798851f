"""The loader process: `python -m server.loader.worker --fd N`.

One job at a time, in the order they come. It shares the processor with the engine, so it takes one thread; it lives as
long as its parent.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
from dataclasses import asdict
from typing import Any

import torch

from server.channel import ChannelClosed, WorkerChannel
from server.loader.errors import AdapterRefused
from server.loader.job import PackingTarget, PrepareJob
from server.loader.prepare import Packer


def serve(channel: WorkerChannel) -> None:
    """Answers messages until the other end closes. Raises ChannelClosed."""
    packer: Packer | None = None
    while True:
        channel.wait()
        for message in channel.receive():
            if message["op"] == "configure":
                packer = Packer(PackingTarget(**message["target"]))
                channel.send({"op": "configured", "variant": packer.variant})
                continue
            assert packer is not None, "a job came before the configuration"
            channel.send(answer(packer, PrepareJob(**message["job"])))


def answer(packer: Packer, job: PrepareJob) -> dict[str, Any]:
    """The reply to one `prepare` message."""
    try:
        return {"op": "prepared", "prepared": asdict(packer.prepare(job))}
    except AdapterRefused as error:
        return {"op": "refused", "error": error.details()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="server.loader.worker", description="Prepares adapters for a Veneer server.")
    parser.add_argument("--fd", type=int, required=True, help="descriptor of the channel to the front")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s loader: %(message)s")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    channel = WorkerChannel.open(parser.parse_args().fd)
    with contextlib.suppress(ChannelClosed):
        serve(channel)


if __name__ == "__main__":
    main()
