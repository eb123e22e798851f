"""`veneer generate`: its arguments. What they start is in `server.offline_run`, imported when it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.front.text import MAX_SEED

_MAX_INT = 2**31 - 1
_Model = Annotated[str, typer.Argument(help="Base model: a directory or a hub id; demo is the small built-in one.")]
_Prompts = Annotated[list[str] | None, typer.Argument(help="Prompts; each runs on every adapter given.")]
_Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", help="Adapter: DIR or NAME=DIR; with demo also a built-in name. Repeatable."),
]
_Input = Annotated[
    Path | None, typer.Option("--input", "-i", help="File of prompts: .jsonl, or text with one a line; - is stdin.")
]
_Format = Annotated[str, typer.Option("--format", "-f", help="plain (the texts) or jsonl (everything).")]


def generate(
    model: _Model,
    prompts: _Prompts = None,
    adapter: _Adapters = None,
    input_: _Input = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File for the answers.")] = None,
    format_: _Format = "plain",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer may have.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, max=_MAX_INT, help="0 is off.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(min=0.01, help="1 is off.")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MAX_SEED, help="Of the first prompt, counting up. Default: drawn.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-text token.")] = False,
    echo: Annotated[bool, typer.Option("--echo", help="Begin each answer with its prompt.")] = False,
    unordered: Annotated[bool, typer.Option("--unordered", help="Write answers as they come.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only answers and errors.")] = False,
    store_dir: Annotated[Path | None, typer.Option(help="Keep checked adapters here for the next run.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    adapter_dtype: Annotated[str, typer.Option(help="auto (the base's), float32 or bfloat16.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Longest prompt plus answer, in tokens.")] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, max=4096, help="Prompts that run at the same time.")] = 256,
    num_threads: Annotated[int | None, typer.Option(min=1, help="Threads of the engine.")] = None,
) -> None:
    """Continue prompts without a server: from the command line, a file, or JSON lines with an adapter per line.

    Exit status: 0 all answered, 1 some prompts failed (each is told in its place), 2 the run could not start.
    """
    from server import offline_run
    from server.engine.request import SamplingParams

    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        ignore_eos=ignore_eos,
    )
    engine = {
        "dtype": dtype,
        "device": device,
        "adapter_dtype": adapter_dtype,
        "max_model_len": max_model_len,
        "num_threads": num_threads,
    }
    options = offline_run.OfflineOptions(
        model=model,
        prompts=tuple(prompts or ()),
        adapters=tuple(adapter or ()),
        input_path=input_,
        output_path=output,
        output_format=format_,
        params=params,
        seed=seed,
        stop=tuple(stop or ()),
        echo=echo,
        is_ordered=not unordered,
        is_quiet=quiet,
        store_dir=store_dir,
        max_num_seqs=max_num_seqs,
        engine=engine,
    )
    raise typer.Exit(offline_run.run(options))
