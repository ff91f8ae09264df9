"""formats/executorch_lowering.py: a quantized layer in ExecuTorch's runtime equals torchao's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from finequant.quantize.rounding import Rounded, stored_scale

INPUTS, OUTPUTS, GROUP = 64, 48, 32


class OneLayer(nn.Module):
    """A model that passes rows of a table through a quantized layer, with a decoder's inputs."""

    def __init__(self, stored: SimpleNamespace) -> None:
        from finequant.quantize.formats.executorch_graph import IntegerLinear

        super().__init__()
        self.register_buffer("table", torch.randn(10, INPUTS))
        self.linear = IntegerLinear(stored, "linear")

    def forward(self, tokens: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        return self.linear(self.table.index_select(0, tokens[0])[None] * (start + 1))


@pytest.mark.slow
def test_a_quantized_layer_computes_what_torchaos_does(tmp_path, monkeypatch):
    from executorch.exir.lowered_backend_module import get_lowered_submodules
    from executorch.runtime import Runtime
    from torchao.quantization import IntxUnpackedToInt8Tensor

    from finequant.quantize.formats.executorch_lowering import lower

    traces, trace = [], torch.export.ExportedProgram.run_decompositions

    def counted(program, *arguments, **named):
        traces.append(program)
        return trace(program, *arguments, **named)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", counted)
    codes = torch.randint(-8, 8, (OUTPUTS, INPUTS), dtype=torch.int8)
    scale = torch.rand(OUTPUTS, INPUTS // GROUP)
    codes[0], scale[0] = 0, 0  # such as the head's row of a padding token
    scale = stored_scale(scale, torch.bfloat16).float()
    bias = 10 * torch.randn(OUTPUTS)
    stored = SimpleNamespace(
        rounded={"linear": Rounded(codes, scale)}, floats={"linear.bias": bias}
    )
    model = OneLayer(stored)
    edge = lower(model.eval(), 8, {})
    assert len(traces) == 2  # ExecuTorch's own two: each takes minutes with a real model
    graph = edge.exported_program().graph_module
    ((_, delegate, _),) = get_lowered_submodules(graph)
    assert "torchao.choose_qparams_affine.default" in str(delegate.original_module.graph)
    assert "integer_linear" not in str(graph)

    file = tmp_path / "layer.pte"
    file.write_bytes(edge.to_executorch().buffer)
    forward = Runtime.get().load_program(str(file)).load_method("forward")
    weight = IntxUnpackedToInt8Tensor(
        qdata=codes,
        scale=scale,
        zero_point=torch.zeros_like(scale, dtype=torch.int8),
        target_dtype=torch.int4,
        block_size=(1, GROUP),
        dtype=torch.float32,
        activation_quantization="int8_asym_per_token",
    )
    for tokens in ([3], [1, 2, 9, 9, 0]):
        (outputs,) = forward.execute([torch.tensor([tokens]), torch.tensor([1])])
        expected = nn.functional.linear(2 * model.table[tokens], weight, bias)
        torch.testing.assert_close(outputs[0], expected, rtol=1e-3, atol=1e-3)
