"""ONNX graphs of a GPT-2, built node by node: one without and one with a KV cache, over one file of weights.

`model.onnx`:           input_ids (batch, length) -> logits (batch, length, vocab_size)
`model_with_past.onnx`: also past_key_values.N.key and .value (batch, heads, past, head size), which may be of length 0,
                        and present.N.key and .value, which are those of the next call.

Batch, length and past are dynamic. Opset 20, the first with Gelu. All numbers are float32; `quantize` makes int8.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from gpt2.errors import UserError, missing_extra
from gpt2.formats.names import CONV1D_WEIGHTS
from gpt2.formats.stored import HEAD, WTE
from gpt2.model import GPT

OPSET, IR_VERSION = 20, 10
FILES = ("model.onnx", "model_with_past.onnx")
DATA_FILE = "model.onnx_data"
_MASKED = -3e38


def write(model: GPT, folder: Path) -> None:
    """Write both graphs and their weights. Raises UserError when onnx is not installed."""
    onnx = package("writing ONNX")
    with (folder / DATA_FILE).open("wb") as file:
        initializers = [_external(onnx, name, p, file) for name, p in model.named_parameters()]
    for name, past in zip(FILES, (False, True), strict=True):
        graph = _Graph(onnx, model, past)
        made = onnx.helper.make_graph(
            graph.nodes, "gpt2", graph.inputs, graph.outputs, [*initializers, *graph.constants]
        )
        opsets = [onnx.helper.make_opsetid("", OPSET)]
        proto = onnx.helper.make_model(made, opset_imports=opsets, ir_version=IR_VERSION, producer_name="gpt2")
        (folder / name).write_bytes(proto.SerializeToString())
        onnx.checker.check_model(str(folder / name))


def quantize(folder: Path) -> None:
    """Make the matrices of both graphs int8, with scales found when they run. Needs onnxruntime."""
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise missing_extra("onnxruntime", "onnx", "int8 for ONNX") from None
    for name in FILES:
        whole = folder / f"float.{name}"
        (folder / name).rename(whole)
        quantize_dynamic(whole, folder / name, weight_type=QuantType.QInt8, use_external_data_format=True)
        whole.unlink()
    (folder / DATA_FILE).unlink(missing_ok=True)


def package(purpose: str) -> Any:
    """The `onnx` package. Raises UserError when it is not installed."""
    try:
        import onnx  # pyright: ignore[reportMissingImports]
        import onnx.checker  # pyright: ignore[reportMissingImports]
        import onnx.helper  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise missing_extra("onnx", "onnx", purpose) from None
    return onnx


def _external(onnx: Any, name: str, parameter: torch.Tensor, file: BinaryIO) -> Any:
    """An initializer whose numbers are in `file`; matrices as (in, out), which MatMul requires."""
    tensor = parameter.detach().to("cpu", torch.float32)
    array = (tensor.t() if name.endswith(CONV1D_WEIGHTS) else tensor).contiguous().numpy()
    file.write(bytes(-file.tell() % 4096))  # so that the file can be mapped
    offset = file.tell()
    file.write(array.tobytes())
    proto = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=array.shape)
    proto.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", DATA_FILE), ("offset", offset), ("length", array.nbytes)):
        proto.external_data.add(key=key, value=str(value))
    return proto


class _Graph:
    """The nodes of one graph, in order. Values are strings, as ONNX has them."""

    def __init__(self, onnx: Any, model: GPT, past: bool) -> None:
        self.onnx, self.config, self.past = onnx, model.config, past
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        integers, floats = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
        value = onnx.helper.make_tensor_value_info
        c = self.config
        heads = ("batch", c.n_head, "past", c.n_embd // c.n_head), ("batch", c.n_head, "total", c.n_embd // c.n_head)
        cached = [f"{i}.{kind}" for i in range(c.n_layer) for kind in ("key", "value")] if past else []
        self.inputs = [value("input_ids", integers, ("batch", "length"))]
        self.inputs += [value(f"past_key_values.{each}", floats, heads[0]) for each in cached]
        self.outputs = [value("logits", floats, ("batch", "length", c.vocab_size))]
        self.outputs += [value(f"present.{each}", floats, heads[1]) for each in cached]
        self._build()

    def _build(self) -> None:
        length = self.node("Shape", ["input_ids"], start=1, end=2)
        begin = self.node("Shape", ["past_key_values.0.key"], start=2, end=3) if self.past else self.integers([0])
        end = self.node("Add", [begin, length])
        zero, one = self.scalar(0), self.scalar(1)
        first, last = (self.node("Squeeze", [each]) for each in (begin, end))
        positions = self.node("Range", [first, last, one])
        everything = self.node("Range", [zero, last, one])  # what there is to look at
        seen = self.node("LessOrEqual", [everything, self.node("Unsqueeze", [positions, self.integers([1])])])
        mask = self.node("Where", [seen, self.number(0.0), self.number(_MASKED)])  # (length, total)
        words = self.node("Gather", [WTE, "input_ids"])
        x = self.node("Add", [words, self.node("Gather", ["transformer.wpe.weight", positions])])
        for i in range(self.config.n_layer):
            x = self.node("Add", [x, self.attention(i, self.norm(x, f"transformer.h.{i}.ln_1"), mask)])
            x = self.node("Add", [x, self.mlp(i, self.norm(x, f"transformer.h.{i}.ln_2"))])
        self.head(self.norm(x, "transformer.ln_f"))

    def attention(self, i: int, x: str, mask: str) -> str:
        c, name = self.config, f"transformer.h.{i}.attn"
        size = c.n_embd // c.n_head
        qkv = self.linear(x, f"{name}.c_attn")
        thirds = self.nodes_of("Split", [qkv], 3, axis=-1, num_outputs=3)
        shape = self.integers([0, 0, c.n_head, size])
        q, k, v = (self.node("Transpose", [self.node("Reshape", [t, shape])], perm=[0, 2, 1, 3]) for t in thirds)
        if self.past:
            k, v = (
                self.node("Concat", [f"past_key_values.{i}.{kind}", new], f"present.{i}.{kind}", axis=2)
                for kind, new in (("key", k), ("value", v))
            )
        q = self.node("Mul", [q, self.number(c.query_factor(i) / size**0.5)])
        scores = self.node("MatMul", [q, self.node("Transpose", [k], perm=[0, 1, 3, 2])])
        weights = self.node("Softmax", [self.node("Add", [scores, mask])], axis=-1)
        y = self.node("Transpose", [self.node("MatMul", [weights, v])], perm=[0, 2, 1, 3])
        return self.linear(self.node("Reshape", [y, self.integers([0, 0, c.n_embd])]), f"{name}.c_proj")

    def mlp(self, i: int, x: str) -> str:
        inner = self.activated(self.linear(x, f"transformer.h.{i}.mlp.c_fc"))
        return self.linear(inner, f"transformer.h.{i}.mlp.c_proj")

    def activated(self, x: str) -> str:
        kind = self.config.activation_function
        if kind in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
            return self.node("Gelu", [x], approximate="tanh")
        if kind in ("gelu", "gelu_python"):
            return self.node("Gelu", [x])
        if kind in ("relu", "tanh"):
            return self.node(kind.capitalize(), [x])
        if kind in ("silu", "swish", "quick_gelu"):
            steep = self.node("Mul", [x, self.number(1.702)]) if kind == "quick_gelu" else x
            return self.node("Mul", [x, self.node("Sigmoid", [steep])])
        raise UserError(f"there is no ONNX graph for {kind}")

    def head(self, x: str) -> None:
        c = self.config
        flat = self.node("Reshape", [x, self.integers([-1, c.n_embd])])
        logits = self.node("Gemm", [flat, WTE if c.tie_word_embeddings else HEAD], transB=1)
        batch = self.node("Shape", ["input_ids"])
        self.node("Reshape", [logits, self.node("Concat", [batch, self.integers([-1])], axis=0)], "logits")

    def norm(self, x: str, name: str) -> str:
        inputs = [x, f"{name}.weight", f"{name}.bias"]
        return self.node("LayerNormalization", inputs, axis=-1, epsilon=self.config.layer_norm_epsilon)

    def linear(self, x: str, name: str) -> str:
        return self.node("Add", [self.node("MatMul", [x, f"{name}.weight"]), f"{name}.bias"])

    def node(self, kind: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        output = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def nodes_of(self, kind: str, inputs: Sequence[str], count: int, **attributes: Any) -> list[str]:
        outputs = [f"{kind.lower()}_{len(self.nodes)}_{i}" for i in range(count)]
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), outputs, name=outputs[0], **attributes))
        return outputs

    def integers(self, values: Sequence[int]) -> str:
        return self._constant(np.array(values, np.int64))

    def scalar(self, value: int) -> str:
        return self._constant(np.array(value, np.int64))

    def number(self, value: float) -> str:
        return self._constant(np.array(value, np.float32))

    def _constant(self, array: np.ndarray) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(self.onnx.numpy_helper.from_array(array, name))
        return name
