"""A GPT that reads like `gpt2.model.GPT` and runs through the CPU kernel, in float32, bfloat16, int8 or int4."""

import ctypes
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from typing import cast

import numpy as np
import torch
from torch import Tensor

from gpt2.cache import KVCache
from gpt2.errors import UserError
from gpt2.model import GPT, GPTConfig, scaled_queries
from gpt2.native.pack import GROUPS, pack

KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
ACTIVATIONS = {  # their numbers in the kernel
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), 0),
    **dict.fromkeys(("gelu", "gelu_python"), 1),
    "relu": 2,
    **dict.fromkeys(("silu", "swish"), 3),
    "quick_gelu": 4,
    "tanh": 5,
}

PRODUCTS = {"c_attn": "attn.c_attn", "c_proj": "attn.c_proj", "c_fc": "mlp.c_fc", "mlp_c_proj": "mlp.c_proj"}


class _Matrix(Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("out", c_int64),
        ("in_", c_int64),
        ("kind", c_int32),
        ("group", c_int32),
    )


class _Layer(Structure):
    _fields_ = (
        ("ln_1_weight", c_void_p),
        ("ln_1_bias", c_void_p),
        ("ln_2_weight", c_void_p),
        ("ln_2_bias", c_void_p),
        ("c_attn", _Matrix),
        ("c_proj", _Matrix),
        ("c_fc", _Matrix),
        ("mlp_c_proj", _Matrix),
    )


class _Model(Structure):
    _fields_ = (
        ("wte", _Matrix),
        ("wpe", _Matrix),
        ("layers", POINTER(_Layer)),
        ("ln_f_weight", c_void_p),
        ("ln_f_bias", c_void_p),
        ("epsilon", c_float),
        ("n_layer", c_int32),
        ("n_head", c_int32),
        ("n_embd", c_int32),
        ("n_inner", c_int32),
        ("activation", c_int32),
        ("threads", c_int32),
    )


class _Cache(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("layer_stride", c_int64),
        ("value_stride", c_int64),
        ("row_stride", c_int64),
        ("head_stride", c_int64),
        ("kind", c_int32),
    )


class NativeGPT:
    """`model`, run by the kernel. For inference only.

    precision: "float32" or "bfloat16" use the model's own weights, where they are (converted if they are of another
        dtype); "int8" and "int4" round them to 8 or 4 bits in small groups, and what they are multiplied with to 8.
        In "int4" the head keeps 8 bits.

    Sums are done in float32, always in the same order: what a row gets does not depend, in a single bit, on the rows
    beside it, nor on how its text was cut into calls. The cache is float32 for float32, else bfloat16.
    The weights are those of the moment: a model that is trained on, or moved, wants a new NativeGPT.
    """

    def __init__(self, model: GPT, precision: str, library: ctypes.CDLL) -> None:
        if precision not in KINDS:
            raise UserError(f"the CPU kernel has no precision '{precision}': there are {', '.join(KINDS)}")
        if model.device.type != "cpu":
            raise UserError(f"the CPU kernel cannot run a model on {model.device}")
        self.config: GPTConfig = model.config
        self.precision, self.device = precision, torch.device("cpu")
        self._library = library
        self._kept: list[Tensor] = []  # what the pointers below point to
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._layers = self._make_layers(weights)
        self._model = self._make_model(weights)
        self._head = self._matrix(model.lm_head.weight.detach(), None, "int8" if precision == "int4" else precision)

    def make_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """An empty cache for `batch_size` rows of up to `max_length` positions (the whole context by default)."""
        c = self.config
        shape = (batch_size, c.n_head, max_length or c.block_size, c.n_embd // c.n_head)
        dtype = torch.float32 if self.precision == "float32" else torch.bfloat16
        return KVCache.allocate(c.n_layer, shape, self.device, dtype)

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """What the head reads: int64 (B, T) -> float32 (B, T, C). See `GPT.hidden_states`."""
        B, T = tokens.shape
        cache = self.make_cache(B, T) if cache is None else cache
        if cache.length + T > self.config.block_size:
            raise UserError(f"{cache.length + T} tokens do not fit the model's context of {self.config.block_size}")
        if cache.length + T > cache.max_length or len(cache) != B:
            raise ValueError(f"{B} x {T} tokens do not fit a cache of {len(cache)} x {cache.max_length}")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
            raise IndexError("a token outside the vocabulary")
        tokens = tokens.contiguous()
        hidden = torch.empty(B, T, self.config.n_embd)
        data, starts = cache.data, np.ascontiguousarray(cache.lengths)
        layer, value, row, head = data.stride()[:4]
        kind = KINDS["float32" if data.dtype == torch.float32 else "bfloat16"]
        view = _Cache(data.data_ptr(), layer, value, row, head, kind)
        self._model.threads = torch.get_num_threads()
        self._library.gpt2_hidden_states(
            byref(self._model),
            byref(view),
            c_void_p(tokens.data_ptr()),
            c_void_p(starts.ctypes.data),
            c_int64(B),
            c_int64(T),
            c_void_p(hidden.data_ptr()),
        )
        cache.lengths += T
        return hidden

    def lm_head(self, hidden: Tensor) -> Tensor:
        """Logits: (..., C) -> float32 (..., vocab_size)."""
        hidden = hidden.float().contiguous()
        logits = torch.empty(*hidden.shape[:-1], self.config.vocab_size)
        self._library.gpt2_head(
            byref(self._head),
            c_void_p(hidden.data_ptr()),
            c_int64(hidden.numel() // hidden.size(-1)),
            c_int32(torch.get_num_threads()),
            c_void_p(logits.data_ptr()),
        )
        return logits

    def _make_layers(self, weights: dict[str, Tensor]) -> ctypes.Array[_Layer]:
        layers = (_Layer * self.config.n_layer)()
        for i, layer in enumerate(layers):
            for name in ("ln_1", "ln_2"):
                for kind in ("weight", "bias"):
                    setattr(layer, f"{name}_{kind}", self._vector(weights[f"transformer.h.{i}.{name}.{kind}"]))
            for ours, name in PRODUCTS.items():
                weight, bias = (weights[f"transformer.h.{i}.{name}.{kind}"] for kind in ("weight", "bias"))
                if ours == "c_attn" and (factor := self.config.query_factor(i)) != 1:
                    weight, bias = scaled_queries(weight, factor), scaled_queries(bias, factor)
                setattr(layer, ours, self._matrix(weight, bias, self.precision))
        return layers

    def _make_model(self, weights: dict[str, Tensor]) -> _Model:
        c, wte, wpe = self.config, weights["transformer.wte.weight"], weights["transformer.wpe.weight"]
        table = "bfloat16" if wte.dtype == torch.bfloat16 else "float32"
        return _Model(
            wte=self._matrix(wte, None, table),
            wpe=self._matrix(wpe, None, table),
            layers=self._layers,
            ln_f_weight=self._vector(weights["transformer.ln_f.weight"]),
            ln_f_bias=self._vector(weights["transformer.ln_f.bias"]),
            epsilon=c.layer_norm_epsilon,
            n_layer=c.n_layer,
            n_head=c.n_head,
            n_embd=c.n_embd,
            n_inner=c.n_inner or 4 * c.n_embd,
            activation=ACTIVATIONS[c.activation_function],
        )

    def _matrix(self, weight: Tensor, bias: Tensor | None, precision: str) -> _Matrix:
        out, in_ = weight.shape
        given = None if bias is None else self._vector(bias)
        if precision in GROUPS:
            packed, scale = pack(weight, precision)
            return _Matrix(self._keep(packed), self._keep(scale), given, out, in_, KINDS[precision], GROUPS[precision])
        own = weight.to(getattr(torch, precision)).contiguous()
        return _Matrix(self._keep(own), None, given, out, in_, KINDS[precision], 0)

    def _vector(self, values: Tensor) -> int:
        return self._keep(values.float().contiguous())

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return cast(int, tensor.data_ptr())
