"""A language model that runs in the CPU kernel, in float32, bfloat16, int8 or int4."""

import ctypes
from ctypes import byref, c_int32, c_int64, c_void_p
from typing import cast

import numpy as np
import torch
from torch import Tensor

from gpt2.cache import KVCache
from gpt2.checks import check_token_ids
from gpt2.errors import ConfigError, RequestError
from gpt2.model import GPT, GPTConfig, scaled_queries
from gpt2.native.quantization import GROUP_SIZES, pack
from gpt2.native.structs import Cache, Layer, Matrix, Model

DTYPE_CODES = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
ACTIVATION_CODES = {  # of the kernel
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), 0),
    **dict.fromkeys(("gelu", "gelu_python"), 1),
    "relu": 2,
    **dict.fromkeys(("silu", "swish"), 3),
    "quick_gelu": 4,
    "tanh": 5,
}

LINEAR_LAYERS = {"c_attn": "attn.c_attn", "c_proj": "attn.c_proj", "c_fc": "mlp.c_fc", "mlp_c_proj": "mlp.c_proj"}


class NativeGPT:
    """`model`, run by the kernel. For inference only; the interface is that of `GPT`.

    precision: "float32" and "bfloat16" use the memory of the model's weights (a copy if they have another dtype);
        "int8" and "int4" quantize weights to 8 or 4 bits in small groups, and activations to 8. In "int4" the head
        has 8 bits.

    Sums are in float32 and in a fixed order, so results are batch invariant bit for bit, and do not depend on how a
    prompt is split into chunks. The KV cache is float32 for float32, else bfloat16.
    The weights are those at construction: after training on or moving the model, make a new NativeGPT.

    Raises ConfigError for another precision and for a model that is not on the CPU.
    """

    def __init__(self, model: GPT, precision: str, library: ctypes.CDLL) -> None:
        if precision not in DTYPE_CODES:
            message = f"the CPU kernel has no precision '{precision}': there are {', '.join(DTYPE_CODES)}"
            raise ConfigError(message, field="precision")
        if model.device.type != "cpu":
            raise ConfigError(f"the CPU kernel cannot run a model on {model.device}")
        self.config: GPTConfig = model.config
        self.precision, self.device = precision, torch.device("cpu")
        self._library = library
        self._kept_alive: list[Tensor] = []  # the tensors that the structs point to
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._layers = self._make_layers(weights)
        self._model = self._make_model(weights)
        self._head = self._make_matrix(
            model.lm_head.weight.detach(), None, "int8" if precision == "int4" else precision
        )

    def make_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """An empty cache for `batch_size` rows of up to `max_length` positions (the whole context by default)."""
        c = self.config
        shape = (batch_size, c.n_head, max_length or c.block_size, c.n_embd // c.n_head)
        dtype = torch.float32 if self.precision == "float32" else torch.bfloat16
        return KVCache.allocate(c.n_layer, shape, self.device, dtype)

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """The input of the head: int64 (B, T) -> float32 (B, T, C). See `GPT.hidden_states`."""
        check_token_ids("tokens", tokens, self.config.vocab_size)
        B, T = tokens.shape
        cache = self.make_cache(B, T) if cache is None else cache
        if cache.length + T > self.config.block_size:
            raise RequestError(f"{cache.length + T} tokens do not fit the model's context of {self.config.block_size}")
        if cache.length + T > cache.max_length or len(cache) != B:
            raise ValueError(f"{B} x {T} tokens do not fit a cache of {len(cache)} x {cache.max_length}")
        tokens = tokens.contiguous()
        hidden = torch.empty(B, T, self.config.n_embd)
        data, starts = cache.data, np.ascontiguousarray(cache.lengths)
        layer, value, row, head = data.stride()[:4]
        kind = DTYPE_CODES["float32" if data.dtype == torch.float32 else "bfloat16"]
        view = Cache(data.data_ptr(), layer, value, row, head, kind)
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

    def _make_layers(self, weights: dict[str, Tensor]) -> ctypes.Array[Layer]:
        layers = (Layer * self.config.n_layer)()
        for i, layer in enumerate(layers):
            for name in ("ln_1", "ln_2"):
                for kind in ("weight", "bias"):
                    setattr(layer, f"{name}_{kind}", self._make_vector(weights[f"transformer.h.{i}.{name}.{kind}"]))
            for field, name in LINEAR_LAYERS.items():
                weight, bias = (weights[f"transformer.h.{i}.{name}.{kind}"] for kind in ("weight", "bias"))
                if field == "c_attn" and (factor := self.config.query_factor(i)) != 1:
                    weight, bias = scaled_queries(weight, factor), scaled_queries(bias, factor)
                setattr(layer, field, self._make_matrix(weight, bias, self.precision))
        return layers

    def _make_model(self, weights: dict[str, Tensor]) -> Model:
        c, wte, wpe = self.config, weights["transformer.wte.weight"], weights["transformer.wpe.weight"]
        table = "bfloat16" if wte.dtype == torch.bfloat16 else "float32"
        return Model(
            wte=self._make_matrix(wte, None, table),
            wpe=self._make_matrix(wpe, None, table),
            layers=self._layers,
            ln_f_weight=self._make_vector(weights["transformer.ln_f.weight"]),
            ln_f_bias=self._make_vector(weights["transformer.ln_f.bias"]),
            epsilon=c.layer_norm_epsilon,
            n_layer=c.n_layer,
            n_head=c.n_head,
            n_embd=c.n_embd,
            n_inner=c.n_inner or 4 * c.n_embd,
            activation=ACTIVATION_CODES[c.activation_function],
        )

    def _make_matrix(self, weight: Tensor, bias: Tensor | None, precision: str) -> Matrix:
        out, in_ = weight.shape
        bias_pointer = None if bias is None else self._make_vector(bias)
        if precision in GROUP_SIZES:
            packed, scale = pack(weight, precision)
            pointers = self._keep_alive(packed), self._keep_alive(scale), bias_pointer
            return Matrix(*pointers, out, in_, DTYPE_CODES[precision], GROUP_SIZES[precision])
        converted = weight.to(getattr(torch, precision)).contiguous()
        return Matrix(self._keep_alive(converted), None, bias_pointer, out, in_, DTYPE_CODES[precision], 0)

    def _make_vector(self, values: Tensor) -> int:
        return self._keep_alive(values.float().contiguous())

    def _keep_alive(self, tensor: Tensor) -> int:
        self._kept_alive.append(tensor)
        return cast(int, tensor.data_ptr())
