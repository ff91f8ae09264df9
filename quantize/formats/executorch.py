"""quantized/ -> a .pte for ExecuTorch: 4-bit linears in XNNPACK's integer kernels, ExecuTorch's own
attention and cache operators, and the metadata that its LLM runner reads.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finequant.finetune.architecture import EMBEDDING, table_positions
from finequant.quantize.checkpoint.stored import QuantizedCheckpoint, copy_beside
from finequant.quantize.formats.contents import Contents, check_block, check_norms
from finequant.quantize.formats.executorch_graph import Decoder
from finequant.quantize.formats.format import NOT_KEPT, Format
from finequant.quantize.formats.naming import file_stem
from finequant.quantize.formats.packing import pack_nibbles, unpack_nibbles
from finequant.quantize.formats.snippet import fenced
from finequant.quantize.rounding import Rounded
from finequant.recipes.artifact import files_in
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Recipe
from finequant.recipes.terminal import doing

if TYPE_CHECKING:
    from executorch.exir import EdgeProgramManager

PACKAGES = {"executorch": "'finequant[executorch]'"}
MOST_BITS = 4
GROUP = 32
"""XNNPACK's group sizes are multiples of this."""

INTEGER, LINEAR = "torchao.choose_qparams_affine.default", "aten.linear.default"
LEFT_BEHIND = {"linear", "addmm", "mm", "bmm", "dequantize_affine"}
"""Operators that would run outside XNNPACK, on weights in float."""


def check_fits(contents: Contents) -> None:
    """Refuses what XNNPACK's 4-bit kernels do not support.

    Raises:
        UserError: for more than 4 bits, group sizes that are not multiples of 32, or blocks that
            the graph does not compute.
    """
    check_norms("executorch", contents.config)
    check_block("executorch", "the graph of this export", contents.config)
    if wide := sorted(bits for bits in contents.linear_bits() if bits > MOST_BITS):
        raise UserError(
            f"executorch: linear layers of {', '.join(map(str, wide))} bits; "
            "XNNPACK's kernels for groups take 4: set quantize.bits=4, and no more in "
            "quantize.head and quantize.layers"
        )
    if uneven := sorted(size for size in contents.linear_group_sizes() if size % GROUP):
        raise UserError(
            f"executorch: groups of {', '.join(map(str, uneven))} weights; XNNPACK takes multiples "
            f"of {GROUP}: set quantize.group_size={GROUP}"
        )


def write(stored: QuantizedCheckpoint, folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Writes the program and the tokenizer; returns figures for the manifest.

    Raises:
        UserError: if XNNPACK did not take every linear layer.
    """
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  # torch.ops.llama
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    from finequant.quantize.formats.executorch_lowering import lower

    length = min(recipe.quantize.cache_length, table_positions(stored.config))
    doing("export: executorch: tracing and lowering the model, which takes minutes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are about future torch releases and the cache
        edge = lower(Decoder(stored, length).eval(), length, metadata(stored, length))
        delegated = count_delegated(edge, stored)
        program = edge.to_executorch(
            ExecutorchBackendConfig(
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
                sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
            )
        )
    name = f"{family(stored)}-{file_stem(recipe, stored.config)}-8da4w.pte"
    with (folder / name).open("wb") as file:
        program.write_to_file(file)
    copy_beside(stored, folder)
    return {"delegated_linears": delegated, "cache_length": length}


def family(stored: QuantizedCheckpoint) -> str:
    """Returns the start of the file name, by which ExecuTorch's app for iOS chooses its template.

    The app has few templates. The one for Qwen 3 is ChatML, so it serves every model with ChatML.
    """
    file = stored.folder / "chat_template.jinja"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return "qwen3" if "<|im_start|>" in text else "llama"


def file_in(folder: Path) -> Path:
    """Returns the export's program, which is named after the model."""
    (file,) = files_in(folder, "*.pte")
    return file


def metadata(stored: QuantizedCheckpoint, length: int) -> dict[str, Any]:
    """Returns the constants that ExecuTorch's LLM runner reads from the program before it runs."""
    config = stored.config
    first = {} if config.bos_token_id is None else {"get_bos_id": config.bos_token_id}
    return first | {
        "get_eos_ids": stored.end_tokens,
        "get_vocab_size": config.vocab_size,
        "get_n_layers": config.num_hidden_layers,
        "get_max_seq_len": length,
        "get_max_context_len": length,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def count_delegated(edge: EdgeProgramManager, stored: QuantizedCheckpoint) -> int:
    """Counts the linear layers inside XNNPACK.

    Raises:
        UserError: if one is outside, or one with codes does not run on integers.
    """
    from executorch.exir.lowered_backend_module import get_lowered_submodules

    graph = edge.exported_program().graph_module
    inside: Counter[str] = Counter()
    for _, module, _ in get_lowered_submodules(graph):
        inside.update(_operators(module.original_module.graph))
    outside = [name for name in _operators(graph.graph) if LEFT_BEHIND & set(name.split("."))]
    blocks = stored.config.num_hidden_layers
    layers = 7 * blocks + 1
    products = layers + 2 * blocks + 1 + 2 * blocks  # the rest: norms and rotations
    integers = len(stored.rounded) - (EMBEDDING in stored.rounded)
    taken = inside[LINEAR] - products + layers
    if outside or taken != layers or inside[INTEGER] != integers:
        raise UserError(
            f"executorch: of {layers} linear layers, {integers} of them with codes, XNNPACK took "
            f"{taken}, {inside[INTEGER]} on integers; outside: {', '.join(outside) or 'none'}: "
            "install the executorch that finequant is tested with: pip install executorch==1.4.1"
        )
    return layers


def _operators(graph: torch.fx.Graph) -> list[str]:
    """Lists the names of called operators, such as aten.linear.default."""
    return [node.target.__name__ for node in graph.nodes if node.op == "call_function"]


def read_back(folder: Path, stored: QuantizedCheckpoint) -> Iterator[tuple[str, Rounded]]:
    """Yields codes and scales of the file, which stores constants under the hash of their bytes.

    Tensors that stayed in float are not read, because the program's constants have no names.

    Raises:
        UserError: if the file has no constant with the bytes of some layer.
    """
    from executorch.exir._serialize._program import deserialize_pte_binary

    data = deserialize_pte_binary(file_in(folder).read_bytes()).named_data
    constants = {key: data.buffers[entry.buffer_index] for key, entry in data.pte_data.items()}
    for name, (codes, scale) in stored.rounded.items():
        if name == EMBEDDING:
            continue
        packed = constants.get(_digest(pack_nibbles(codes)))
        scales = constants.get(f"scale_{_digest(scale.to(torch.bfloat16))}")
        if packed is None or scales is None:
            raise UserError(f"executorch: the file lacks the codes of {name}: {NOT_KEPT}")
        nibbles = torch.frombuffer(bytearray(packed), dtype=torch.uint8).view(len(codes), -1)
        read = torch.frombuffer(bytearray(scales), dtype=torch.bfloat16).view_as(scale)
        yield name, Rounded(unpack_nibbles(nibbles), read)


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def token_ids(folder: Path, texts: list[str]) -> list[list[int]]:
    """Tokenizes texts with the tokenizer of ExecuTorch's runner."""
    from pytorch_tokenizers import CppHFTokenizer

    tokenizer = CppHFTokenizer()
    tokenizer.load(str(folder / "tokenizer.json"))
    return [tokenizer.encode(text, 0, 0) for text in texts]


class ExecuTorch:
    """A .pte in ExecuTorch's runtime on the CPU."""

    def __init__(self, file: Path) -> None:
        import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  # its operators
        from executorch.runtime import Runtime as Engine

        self._program = Engine.get().load_program(str(file))
        self._forward = self._program.load_method("forward")

    def last_logits(self, ids: list[int], start: int = 0) -> torch.Tensor:
        (logits,) = self._forward.execute([torch.tensor([ids]), torch.tensor([start])])
        return logits[0].clone()  # the runtime reuses its memory

    def metadata(self, name: str) -> list[int | bool]:
        """Returns one of the constants for ExecuTorch's LLM runner, such as `get_eos_ids`."""
        return list(self._program.load_method(name).execute([]))


def snippet(repository: str, chat: str, files: list[str]) -> str:
    """Writes how to get the files that ExecuTorch's apps ask for."""
    listed = ", ".join(f"`{file}`" for file in files)
    return (
        "### ExecuTorch\n\n"
        + fenced("bash", f'hf download {repository} --include "executorch/*" --local-dir model')
        + f"\n\n{listed}: for ExecuTorch's LLM runner and its demo apps for Android and iOS."
    )


FORMAT = Format(
    name="executorch",
    report_key="pte",
    packages=PACKAGES,
    check_fits=check_fits,
    write=write,
    read_back=read_back,
    snippet=snippet,
    ignores_penalty="ExecuTorch's LLM runner",
    bytes_per_weight=5.0,
    weights="*.pte",
    names_floats=False,
    token_ids=token_ids,
    runtime=lambda folder, context: ExecuTorch(file_in(folder)),  # the file sets its cache's length
    runtime_packages=PACKAGES,
)
