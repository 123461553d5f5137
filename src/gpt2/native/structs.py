"""The structs of `kernel.cpp` as ctypes structures."""

from ctypes import CDLL, POINTER, Structure, c_float, c_int32, c_int64, c_void_p, sizeof


class Matrix(Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("out", c_int64),
        ("in_", c_int64),
        ("kind", c_int32),
        ("group", c_int32),
    )


class Layer(Structure):
    _fields_ = (
        ("ln_1_weight", c_void_p),
        ("ln_1_bias", c_void_p),
        ("ln_2_weight", c_void_p),
        ("ln_2_bias", c_void_p),
        ("c_attn", Matrix),
        ("c_proj", Matrix),
        ("c_fc", Matrix),
        ("mlp_c_proj", Matrix),
    )


class Model(Structure):
    _fields_ = (
        ("wte", Matrix),
        ("wpe", Matrix),
        ("layers", POINTER(Layer)),
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


class Cache(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("layer_stride", c_int64),
        ("value_stride", c_int64),
        ("row_stride", c_int64),
        ("head_stride", c_int64),
        ("kind", c_int32),
    )


def check_struct_sizes(library: CDLL) -> None:
    """Raise RuntimeError if a structure here has another size than in the compiled library."""
    structures = (Matrix, Layer, Model, Cache)
    sizes = (c_int64 * len(structures))()
    library.gpt2_struct_sizes(sizes)
    for structure, size in zip(structures, sizes, strict=True):
        if sizeof(structure) != size:
            name = structure.__name__
            raise RuntimeError(f"struct {name} has {size} bytes in kernel.cpp and {sizeof(structure)} in structs.py")
