"""`veneer generate`: many prompts through a model and its adapters, without a server. This file has the options only.

Exit codes: 0 every prompt was answered, 1 some failed, 2 nothing could be run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.engine.request import SamplingParams

_DEFAULT_NEW_TOKENS = 64
Adapters = Annotated[
    list[str] | None,
    typer.Option(help="DIR, NAME=DIR, or the name of a built-in one; repeatable. Without it the base answers."),
]
Input = Annotated[
    Path | None, typer.Option("--input", help="Prompts: a .jsonl file, a text file (one a line), or - for stdin.")
]


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory, a Hugging Face id, or `demo`.")],
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Prompts to continue.")] = None,
    adapter: Adapters = None,
    input_path: Input = None,
    output_path: Annotated[Path | None, typer.Option("--output", help="Where answers go. Default: stdout.")] = None,
    output_format: Annotated[str, typer.Option("--format", help="plain or jsonl.")] = "plain",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = _DEFAULT_NEW_TOKENS,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(min=0.01)] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the first prompt, counting up. Default: drawn.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends an answer; repeatable.")] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Put the prompt in front of its answer.")] = False,
    is_ordered: Annotated[bool, typer.Option("--ordered/--as-they-come", help="Answers in the prompts' order.")] = True,
    is_quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    store_dir: Annotated[Path | None, typer.Option(help="Keep packed adapters here. Default: nowhere.")] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, max=4096, help="Prompts that run at the same time.")] = 256,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    adapter_dtype: Annotated[str, typer.Option(help="auto (the base's), float32 or bfloat16.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(min=1)] = None,
    num_threads: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Continue prompts without a server: from the command line, a file, or stdin."""
    from server.offline_run import OfflineOptions, run

    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
    )
    engine = {
        "dtype": dtype,
        "device": device,
        "adapter_dtype": adapter_dtype,
        "max_model_len": max_model_len,
        "num_threads": num_threads,
    }
    options = OfflineOptions(
        model=model,
        prompts=tuple(prompts or ()),
        adapters=tuple(adapter or ()),
        input_path=input_path,
        output_path=output_path,
        output_format=output_format,
        params=params,
        seed=seed,
        stop=tuple(stop or ()),
        echo=echo,
        is_ordered=is_ordered,
        is_quiet=is_quiet,
        store_dir=store_dir,
        max_num_seqs=max_num_seqs,
        engine=engine,
    )
    raise typer.Exit(run(options))
