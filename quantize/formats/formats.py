"""The table of formats. A new one is a file beside this one, an entry here, and its name in
`Export` of recipes/schema.py, so that a recipe may ask for it.

Importing this module imports torch, so commands that answer `--help` import it inside functions.
"""

from __future__ import annotations

from finequant.quantize.formats import compressed_tensors, executorch, gguf, mlx, onnx
from finequant.quantize.formats.format import Format

FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        compressed_tensors.FORMAT,
        gguf.FORMAT,
        executorch.FORMAT,
        onnx.FORMAT,
        mlx.FORMAT,
    )
}
"""All formats by name, except torchao's, which is quantized/ itself."""


def report_key(name: str) -> str:
    """Returns the key of an export's column in report.json; an unknown format's is its name."""
    return FORMATS[name].report_key if name in FORMATS else name
