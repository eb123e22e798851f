"""Runs `lorax-client` and `text-generation` against a server and prints what they saw as JSON; not a test itself."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

PROMPT = "once upon"


def lorax_findings(url: str) -> dict[str, Any]:
    from lorax import AsyncClient, Client
    from lorax.errors import NotFoundError, ValidationError

    client: Any = Client(url, timeout=60)
    plain = client.generate(PROMPT, max_new_tokens=6)
    poet = client.generate(PROMPT, adapter_id="poet", max_new_tokens=6, decoder_input_details=True)
    stream = list(client.generate_stream(PROMPT, adapter_id="poet", max_new_tokens=6))
    stopped = client.generate(PROMPT, max_new_tokens=6, stop_sequences=[poet.generated_text[:1] or "x"])
    found: dict[str, Any] = {
        "plain": plain.generated_text,
        "poet": poet.generated_text,
        "prompt_tokens": poet.details.prompt_tokens,
        "prefill": len(poet.details.prefill),
        "tokens": len(poet.details.tokens),
        "streamed": stream[-1].generated_text,
        "stream_tokens": len(stream),
        "stopped": stopped.details.finish_reason.value,
        "alternatives": len(
            client.generate(PROMPT, max_new_tokens=2, return_k_alternatives=2).details.tokens[0].alternative_tokens
        ),
    }

    async def asynchronous() -> Any:
        make: Any = AsyncClient
        there = make(url, timeout=60)
        return await there.generate(PROMPT, adapter_id="poet", max_new_tokens=6)

    found["async"] = asyncio.run(asynchronous()).generated_text
    refusals: list[tuple[str, Any, dict[str, Any]]] = [
        ("unknown", NotFoundError, {"adapter_id": "nobody"}),
        ("invalid", ValidationError, {"max_new_tokens": 10**6}),
    ]
    for name, error, parameters in refusals:
        try:
            client.generate(PROMPT, **parameters)
            found[name] = "no error"
        except error as seen:
            found[name] = str(seen)
    return found


def text_generation_findings(url: str) -> dict[str, Any]:
    from text_generation import Client
    from text_generation.errors import ValidationError

    client: Any = Client(url, timeout=60)
    plain = client.generate(PROMPT, max_new_tokens=6, top_n_tokens=2)
    stream = list(client.generate_stream(PROMPT, max_new_tokens=6))
    found: dict[str, Any] = {
        "plain": plain.generated_text,
        "tokens": len(plain.details.tokens),
        "top": len(plain.details.top_tokens[0]),
        "streamed": stream[-1].generated_text,
        "best_of": len(client.generate(PROMPT, max_new_tokens=3, do_sample=True, best_of=2).details.best_of_sequences),
    }
    try:
        client.generate(PROMPT, max_new_tokens=10**6)
        found["invalid"] = "no error"
    except ValidationError as seen:
        found["invalid"] = str(seen)
    return found


if __name__ == "__main__":
    print(json.dumps({"lorax": lorax_findings(sys.argv[1]), "text_generation": text_generation_findings(sys.argv[1])}))
