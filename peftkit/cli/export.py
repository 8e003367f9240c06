"""`peftkit export`: an adapter folder written for another tool, or refused with the reason."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from peftkit.cli.app import Json, app


class Target(StrEnum):
    """Who is exported for."""

    peft = "peft"
    merged = "merged"
    gguf = "gguf"
    vllm = "vllm"


class Dtype(StrEnum):
    """How the factors are stored."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@app.command()
def export(
    adapter: Annotated[str, typer.Argument(help="An adapter folder, peftkit's or Hugging Face peft's.")],
    out: Annotated[str, typer.Argument(help="Folder to write; for gguf also a file name that ends in .gguf.")],
    to: Annotated[Target, typer.Option("--to", help="Who reads it.")],
    base: Annotated[
        str | None,
        typer.Option("--base", help="Folder of the base model or its name on the hub; default: what ADAPTER names."),
    ] = None,
    name: Annotated[str, typer.Option("--name", help="Subfolder of ADAPTER, where it holds several.")] = "default",
    rank: Annotated[
        int | None, typer.Option("--rank", help="Convert to LoRA of at most this rank, as near as can be.")
    ] = None,
    error: Annotated[
        float | None,
        typer.Option("--error", help="Convert to LoRA with at most this error at each weight, such as 0.01."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Of the factors.")] = Dtype.float32,
    max_lora_rank: Annotated[
        int | None, typer.Option("--max-lora-rank", help="What vLLM is started with; checked with --to vllm.")
    ] = None,
    into: Annotated[
        str | None, typer.Option("--into", help="bf16, fp16 or fp32, with --to merged; default: as the base is.")
    ] = None,
    base_name: Annotated[
        str | None, typer.Option("--base-name", help="What the export shall call the base model.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that holds files.")] = False,
    as_json: Json = False,
) -> None:
    """Write an adapter for another tool; what that tool would reject or read wrong is refused, and nothing written."""
    from peftkit.export import export as write

    made = write(
        adapter,
        out,
        to=to.value,
        base=base,
        name=name,
        rank=rank,
        error=error,
        dtype=dtype.value,
        max_lora_rank=max_lora_rank,
        into=into,
        base_name=base_name,
        overwrite=overwrite,
    )
    print(made.to_json() if as_json else made)
