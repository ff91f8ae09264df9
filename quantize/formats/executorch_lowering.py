"""Lowers the decoder's graph to ExecuTorch's, and delegates to XNNPACK whatever it supports.

Lowering traces the graph many times, in Python and with symbolic shapes, so every node costs time
again and again: 30 layers took more than a quarter of an hour. Here a quantized linear layer is one
node until the last moment, and traces that would change nothing are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torchao.quantization.quant_primitives  # noqa: F401  # torch.ops.torchao
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec
from executorch.exir.dialects._ops import ops
from executorch.exir.pass_base import ExportPass

if TYPE_CHECKING:
    from executorch.exir import EdgeProgramManager
    from executorch.exir.pass_base import NodeMetadata, ProxyValue

    from finequant.quantize.formats.executorch_graph import Decoder

INT8, INT4 = (torch.int8, -128, 127), (torch.int8, -8, 7)
"""Ranges of codes, as torchao takes them: dtype, minimum and maximum."""


def lower(model: Decoder, length: int, metadata: dict[str, Any]) -> EdgeProgramManager:
    """Exports with a dynamic number of tokens, and delegates whatever XNNPACK supports."""
    count = torch.export.Dim("count", min=1, max=length)
    example = (torch.ones(1, 3, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    with torch.no_grad():
        exported = torch.export.export(model, example, dynamic_shapes=({1: count}, {}))
    return to_edge_transform_and_lower(
        exported,
        transform_passes=[ExpandIntegerLinear()],
        partitioner=[Partitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods=metadata,
    )


class ExpandIntegerLinear(ExportPass):
    """Replaces `finequant.integer_linear` by torchao's operations that XNNPACK's kernels match."""

    def call_operator(
        self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], meta: NodeMetadata
    ) -> ProxyValue:
        if op is not ops.edge.finequant.integer_linear.default:
            return super().call_operator(op, args, kwargs, meta)

        def call(operator: Any, *arguments: Any) -> ProxyValue:
            return super(ExpandIntegerLinear, self).call_operator(operator, arguments, {}, meta)

        affine, (inputs, codes, scale, zero, *bias) = ops.edge.torchao, args
        width, groups = codes.data.shape[1], scale.data.shape[1]
        token = [1] * (inputs.data.dim() - 1) + [width]
        ranges = call(
            affine.choose_qparams_affine.default,
            *(inputs, "ASYMMETRIC", token, *INT8, None, None, torch.int8),
        )
        steps = [self.call_getitem(ranges, index, meta) for index in (0, 1)]
        rounded = call(affine.quantize_affine.default, inputs, token, *steps, *INT8)
        dequantized = call(affine.dequantize_affine.default, rounded, token, *steps, *INT8)
        weight = call(
            affine.dequantize_affine.default, codes, [1, width // groups], scale, zero, *INT4
        )
        return call(ops.edge.aten.linear.default, dequantized, weight, *bias)


class Partitioner(XnnpackPartitioner):
    """XNNPACK's partitioner, for a graph that already consists of XNNPACK's operators."""

    def __init__(self) -> None:
        super().__init__()
        # The key makes XNNPACK run only one of its 17 passes over each delegate (executorch 1.4.1,
        # xnnpack_preprocess.py): the others change nothing here, and take most of the time.
        spec = CompileSpec("dqlinear_partitioner", b"")
        self.delegation_spec = DelegationSpec(self.delegation_spec.backend_id, [spec])

    def ops_to_not_decompose(self, ep: torch.export.ExportedProgram) -> tuple[list[Any], None]:
        """Lists operators to keep whole, without a filter: a filter for nodes costs two traces."""
        operators, _ = super().ops_to_not_decompose(ep)
        return operators, None
