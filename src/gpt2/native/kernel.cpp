// GPT-2 inference on a CPU with one call for all layers: the arithmetic of model.py without a framework.
//
// Decoding is bandwidth-bound: a step reads every weight once and computes little with it, so the fixed cost of each
// framework operation matters. Here a step is one parallel region; each matrix is read in one sequential stream, and
// its input (a few tokens) stays in the caches.
//
// Batch invariant, bit for bit: every sum has an order that depends on the shape of the model alone.
//
// Weights:
//   float32, bfloat16  (out, in) as in torch, in torch's memory
//   int8, int4         (out / 16, in / 4, 16 rows, 4 weights), unsigned, with the zero point at 128 or 8. In int4 the
//                      low half of a byte belongs to one step of 4 inputs, the high half to the next one. Each `group`
//                      of inputs of each row has a bfloat16 scale. Activations are quantized to int8, with a scale for
//                      each token and group.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
typedef float F32 __attribute__((vector_size(4 * LANES)));
typedef int32_t I32 __attribute__((vector_size(4 * LANES)));
typedef uint32_t U32 __attribute__((vector_size(4 * LANES)));
typedef uint16_t U16 __attribute__((vector_size(2 * LANES)));
typedef uint8_t U8 __attribute__((vector_size(4 * LANES)));
typedef int8_t I8 __attribute__((vector_size(LANES)));

template <class V, class T> inline V load(const T *from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class V, class T> inline void store(T *to, V v) { std::memcpy(to, &v, sizeof v); }

// Keep a value in its register: GCC would load it again for each use, and load bandwidth is the bottleneck.
#if defined(__AVX512F__)
#define KEEP(v) asm("" : "+v"(v))
#else
#define KEEP(v) (void)0
#endif

inline F32 splat(float x) { return F32{} + x; }

inline float sum(F32 v) {  // in a fixed order
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  return v[0];
}

// The sums of four vectors, in 4 lanes each: a's in lanes 0-3, b's in 4-7, c's in 8-11, d's in 12-15.
inline F32 sums(F32 a, F32 b, F32 c, F32 d) {
  F32 ab = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  F32 cd = __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  F32 v = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
          __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  return v;
}

inline float largest(F32 v) {
  float most = v[0];
  for (int i = 1; i < LANES; i++) most = std::max(most, v[i]);
  return most;
}

inline float widen(uint16_t bits) {
  uint32_t word = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}
inline F32 widen(U16 bits) { return (F32)(__builtin_convertvector(bits, U32) << 16); }

inline uint16_t narrow(float x) {  // round to nearest, ties to even; nan stays nan
  uint32_t word;
  std::memcpy(&word, &x, 4);
  if ((word & 0x7fffffff) > 0x7f800000) return uint16_t(word >> 16 | 0x40);
  return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

// e^x to about one unit in the last place (Cephes' polynomial)
inline F32 exp(F32 x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const F32 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  F32 shifted = x * 1.44269504088896341f + magic;
  F32 n = shifted - magic;
  F32 r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  F32 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  I32 power = ((I32)shifted - (I32)magic + 127) << 23;
  return p * (F32)power;
}

}  // namespace

extern "C" {

enum Kind : int32_t { FLOAT32, BFLOAT16, INT8, INT4 };
enum Activation : int32_t { GELU_TANH, GELU, RELU, SILU, QUICK_GELU, TANH };

struct Matrix {
  const void *weight;
  const uint16_t *scale;  // int8 and int4 only: bfloat16 (out / 16, in / group, 16)
  const float *bias;      // or null
  int64_t out, in;        // of the layer; packed weights are padded to whole blocks and groups
  int32_t kind, group;
};

struct Layer {
  const float *ln_1_weight, *ln_1_bias, *ln_2_weight, *ln_2_bias;
  Matrix c_attn, c_proj, c_fc, mlp_c_proj;
};

struct Model {
  Matrix wte, wpe;  // float32 or bfloat16 tables
  const Layer *layers;
  const float *ln_f_weight, *ln_f_bias;
  float epsilon;
  int32_t n_layer, n_head, n_embd, n_inner, activation, threads;
};

struct Cache {
  void *data;
  int64_t layer_stride, value_stride, row_stride, head_stride;  // in elements; positions are contiguous
  int32_t kind;                                                 // float32 or bfloat16
};

}  // extern "C"

namespace {

// The input of a matrix product, in the format of the matrix.
struct Operand {
  int64_t in = 0, padded = 0, groups = 0;
  const float *f32 = nullptr;
  std::vector<uint16_t> bf16;
  std::vector<int8_t> q;
  std::vector<float> scale;   // (tokens, groups)
  std::vector<int32_t> sums;  // (tokens, groups): of q

  void shape(const Matrix &w, int64_t tokens) {
    in = w.in;
    groups = w.group ? (in + w.group - 1) / w.group : 0;
    padded = groups * w.group;
    if (w.kind == BFLOAT16) bf16.resize(tokens * in);
    if (w.kind == INT8 || w.kind == INT4) {
      q.resize(tokens * padded);
      scale.resize(tokens * groups);
      sums.resize(tokens * groups);
    }
  }

  // To be called for every token before the product.
  void convert(const Matrix &w, int64_t token, const float *x) {
    if (w.kind == BFLOAT16) {
      uint16_t *to = bf16.data() + token * in;
      for (int64_t i = 0; i < in; i++) to[i] = narrow(x[i]);
    }
    if (w.kind == INT8 || w.kind == INT4)
      for (int64_t g = 0; g < groups; g++) {
        const int64_t begin = g * w.group, count = std::min<int64_t>(w.group, in - begin), at = token * groups + g;
        quantize(x + begin, count, w.group, q.data() + token * padded + begin, scale[at], sums[at]);
      }
  }

  // Quantize to -127..127; a group (a multiple of 16) that ends early is padded with zeros.
  static void quantize(const float *x, int64_t count, int64_t group, int8_t *to, float &scale, int32_t &total) {
    F32 most = {};
    I32 none = {}, lanes = {};
    auto part = [&](int64_t i) {
      F32 v = {};
      std::memcpy(&v, x + i, 4 * std::min<int64_t>(LANES, count - i));
      return v;
    };
    for (int64_t i = 0; i < count; i += LANES) {
      F32 v = (F32)((I32)part(i) & 0x7fffffff);
      none |= v != v;
      most = v > most ? v : most;
    }
    const float top = largest(most), inverse = top > 0 ? 127.0f / top : 0.0f;
    const F32 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    for (int64_t i = 0; i < group; i += LANES) {
      I32 whole = i < count ? (I32)(part(i) * inverse + magic) - (I32)magic : I32{};
      lanes += whole;
      store(to + i, __builtin_convertvector(whole, I8));
    }
    bool broken = !std::isfinite(top);
    total = 0;
    for (int i = 0; i < LANES; i++) {
      broken |= none[i] != 0;
      total += lanes[i];
    }
    scale = broken ? NAN : top / 127.0f;  // nan propagates, as in float32
  }
};

// How the products are written to `y` (tokens, out).
enum Epilogue { STORE, ADD, ACTIVATE };

struct Output {
  float *y;
  int64_t stride;
  Epilogue epilogue;
  int32_t activation;

  inline void put(int64_t token, int64_t row, float value) const {
    float &to = y[token * stride + row];
    to = epilogue == ADD ? to + value : value;
  }
};

// acc[r * M + m] += row r times token m, in each lane; `rest` is the sum over the last elements of the rows.
template <int R, int M> inline void dots(const float *w, const float *x, int64_t in, F32 *acc, float *rest) {
  int64_t k = 0;
  for (; k + LANES <= in; k += LANES) {
    F32 ws[R];
    for (int r = 0; r < R; r++) {
      ws[r] = load<F32>(w + r * in + k);
      KEEP(ws[r]);
    }
    for (int m = 0; m < M; m++) {
      F32 xs = load<F32>(x + m * in + k);
      KEEP(xs);
      for (int r = 0; r < R; r++) acc[r * M + m] += ws[r] * xs;
    }
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++)
      for (int64_t i = k; i < in; i++) rest[r * M + m] += w[r * in + i] * x[m * in + i];
}

inline void dot_pairs(F32 &acc, U32 w, U32 x) {  // 32 products of bfloat16
#if defined(__AVX512BF16__)
  acc = (F32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
#else
  acc += (F32)(w << 16) * (F32)(x << 16);
  acc += (F32)(w & 0xffff0000u) * (F32)(x & 0xffff0000u);
#endif
}

template <int R, int M> inline void dots(const uint16_t *w, const uint16_t *x, int64_t in, F32 *acc, float *rest) {
  int64_t k = 0;
  for (; k + 2 * LANES <= in; k += 2 * LANES) {
    U32 ws[R];
    for (int r = 0; r < R; r++) {
      ws[r] = load<U32>(w + r * in + k);
      KEEP(ws[r]);
    }
    for (int m = 0; m < M; m++) {
      U32 xs = load<U32>(x + m * in + k);
      KEEP(xs);
      for (int r = 0; r < R; r++) dot_pairs(acc[r * M + m], ws[r], xs);
    }
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++)
      for (int64_t i = k; i < in; i++) rest[r * M + m] += widen(w[r * in + i]) * widen(x[m * in + i]);
}

template <int R, int M, class T>
void tile(const Matrix &w, const T *x, int64_t row, int64_t token, const Output &out) {
  F32 acc[R * M] = {};
  float rest[R * M] = {};
  const T *weight = (const T *)w.weight + row * w.in;
  if constexpr (M == 1)  // one row after the other: a single stream has the highest memory bandwidth
    for (int r = 0; r < R; r++) dots<1, 1>(weight + r * w.in, x + token * w.in, w.in, acc + r, rest + r);
  else
    dots<R, M>(weight, x + token * w.in, w.in, acc, rest);
  for (int m = 0; m < M; m++) {
    F32 four = {};
    if constexpr (R == 4) four = sums(acc[m], acc[M + m], acc[2 * M + m], acc[3 * M + m]);
    for (int r = 0; r < R; r++) {
      float total = R == 4 ? four[4 * r] : sum(acc[r * M + m]);
      out.put(token + m, row + r, total + rest[r * M + m] + (w.bias ? w.bias[row + r] : 0.0f));
    }
  }
}

template <int M, class T>
void rows_of(const Matrix &w, const T *x, int64_t begin, int64_t end, int64_t token, const Output &out) {
  int64_t row = begin;
  for (; row + 4 <= end; row += 4) tile<4, M>(w, x, row, token, out);
  for (; row < end; row++) tile<1, M>(w, x, row, token, out);
}

inline I32 dot_fours(I32 acc, U8 w, const int8_t *x) {  // in each lane, four weights with the same four inputs
  int32_t four;
  std::memcpy(&four, x, 4);
#if defined(__AVX512VNNI__)
  return (I32)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(four));
#else
  U32 words = (U32)w;
  for (int j = 0; j < 4; j++) acc += (I32)(words >> (8 * j) & 0xff) * int32_t(x[j]);
  return acc;
#endif
}

// 16 rows of packed weights with M tokens.
template <int M, int BITS>
void block(const Matrix &w, const Operand &x, int64_t index, int64_t token, const Output &out) {
  constexpr int ZERO = BITS == 8 ? 128 : 8;
  const int64_t bytes = x.padded * LANES * BITS / 8;
  const uint8_t *weight = (const uint8_t *)w.weight + index * bytes;
  const uint16_t *scale = w.scale + index * x.groups * LANES;
  const int8_t *q[M];
  for (int m = 0; m < M; m++) q[m] = x.q.data() + (token + m) * x.padded;
  F32 total[M] = {};
  for (int64_t g = 0; g < x.groups; g++) {
    I32 acc[M];
    for (int m = 0; m < M; m++) acc[m] = I32{} - ZERO * x.sums[(token + m) * x.groups + g];
    const int64_t first = g * w.group;
    for (int64_t k = first; k < first + w.group; k += BITS == 8 ? 4 : 8, weight += 4 * LANES) {
      U8 ws = load<U8>(weight);
      if (BITS == 8) {
        for (int m = 0; m < M; m++) acc[m] = dot_fours(acc[m], ws, q[m] + k);
      } else {
        U8 low = ws & 0x0f, high = (U8)((U32)ws >> 4) & 0x0f;
        for (int m = 0; m < M; m++) acc[m] = dot_fours(acc[m], low, q[m] + k);
        for (int m = 0; m < M; m++) acc[m] = dot_fours(acc[m], high, q[m] + k + 4);
      }
    }
    F32 scales = widen(load<U16>(scale + g * LANES));
    for (int m = 0; m < M; m++)
      total[m] += __builtin_convertvector(acc[m], F32) * (scales * x.scale[(token + m) * x.groups + g]);
  }
  const int64_t row = index * LANES, rows = std::min<int64_t>(LANES, w.out - row);
  for (int m = 0; m < M; m++)
    for (int64_t r = 0; r < rows; r++) out.put(token + m, row + r, total[m][r] + (w.bias ? w.bias[row + r] : 0.0f));
}

template <int M> void tokens_product(const Matrix &w, const Operand &x, int64_t begin, int64_t end, int64_t token, const Output &out) {
  if (w.kind == FLOAT32) rows_of<M>(w, x.f32, begin, end, token, out);
  if (w.kind == BFLOAT16) rows_of<M>(w, x.bf16.data(), begin, end, token, out);
  for (int64_t i = begin / LANES; w.kind == INT8 && i * LANES < end; i++) block<M, 8>(w, x, i, token, out);
  for (int64_t i = begin / LANES; w.kind == INT4 && i * LANES < end; i++) block<M, 4>(w, x, i, token, out);
}

inline F32 activated(F32 x, int32_t activation) {
  if (activation == RELU) return x > 0.0f ? x : splat(0.0f);
  if (activation == SILU) return x / (1.0f + exp(-x));
  if (activation == QUICK_GELU) return x / (1.0f + exp(-1.702f * x));
  if (activation == TANH) return 1.0f - 2.0f / (1.0f + exp(2.0f * x));
  if (activation == GELU) {
    for (int i = 0; i < LANES; i++) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678118654752f));
    return x;
  }
  F32 u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return x - x / (1.0f + exp(2.0f * u));  // x/2 (1 + tanh u)
}

void activate(float *y, int64_t count, int32_t activation) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(y + i, activated(load<F32>(y + i), activation));
  if (i < count) {
    F32 v = {};
    std::memcpy(&v, y + i, 4 * (count - i));
    v = activated(v, activation);
    std::memcpy(y + i, &v, 4 * (count - i));
  }
}

// y = x W^T + b for all tokens. To be called by every thread of a parallel region; ends with a barrier.
void product(const Matrix &w, const Operand &x, int64_t tokens, const Output &out, int32_t threads) {
  constexpr int64_t STREAM = 128 << 10;  // bytes that a thread reads at a time; less is slower
  constexpr int64_t ROWS = 2 * LANES;
  constexpr int M = 4;
  constexpr int BITS[] = {32, 16, 8, 4};
  const int64_t bytes = w.out * w.in * BITS[w.kind] / 8;
  const int64_t wanted = threads * std::max<int64_t>(1, bytes / (threads * STREAM));  // the same number for each thread
  const int64_t rows = ((w.out + wanted - 1) / wanted + ROWS - 1) / ROWS * ROWS;
  const int64_t chunks = (w.out + rows - 1) / rows;
#pragma omp for schedule(dynamic, 1)
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    const int64_t begin = chunk * rows, end = std::min(w.out, begin + rows);
    int64_t token = 0;
    for (; token + M <= tokens; token += M) tokens_product<M>(w, x, begin, end, token, out);
    switch (tokens - token) {
    case 3: tokens_product<3>(w, x, begin, end, token, out); break;
    case 2: tokens_product<2>(w, x, begin, end, token, out); break;
    case 1: tokens_product<1>(w, x, begin, end, token, out); break;
    }
    if (out.epilogue == ACTIVATE)
      for (int64_t t = 0; t < tokens; t++) activate(out.y + t * out.stride + begin, end - begin, out.activation);
  }
}

void layer_norm(const float *x, const float *weight, const float *bias, float epsilon, int64_t n, float *y) {
  F32 lanes = {};
  int64_t whole = n / LANES * LANES;
  float rest = 0;
  for (int64_t i = 0; i < whole; i += LANES) lanes += load<F32>(x + i);
  for (int64_t i = whole; i < n; i++) rest += x[i];
  const float mean = (sum(lanes) + rest) / n;
  lanes = F32{}, rest = 0;
  for (int64_t i = 0; i < whole; i += LANES) {
    F32 d = load<F32>(x + i) - mean;
    lanes += d * d;
  }
  for (int64_t i = whole; i < n; i++) rest += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / std::sqrt((sum(lanes) + rest) / n + epsilon);
  for (int64_t i = 0; i < n; i++) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

inline F32 get(const float *p) { return load<F32>(p); }
inline F32 get(const uint16_t *p) { return widen(load<U16>(p)); }
inline float get1(const float *p) { return *p; }
inline float get1(const uint16_t *p) { return widen(*p); }
inline void set1(float *p, float x) { *p = x; }
inline void set1(uint16_t *p, float x) { *p = narrow(x); }

// One head of one token, over `length` positions: y (D) = softmax(q K^T / sqrt(D)) V.
template <class T>
void attend(const float *q, const T *keys, const T *values, int64_t length, int64_t D, float *scores, float *y) {
  const float scale = 1.0f / std::sqrt(float(D));
  const int64_t whole = D / LANES * LANES;
  F32 most = splat(-INFINITY);
  for (int64_t s = 0; s < length; s += 4) {  // four keys at a time; the last one may repeat
    F32 lanes[4] = {};
    float rest[4] = {};
    for (int j = 0; j < 4; j++) {
      const T *key = keys + std::min(s + j, length - 1) * D;
      for (int64_t d = 0; d < whole; d += LANES) lanes[j] += load<F32>(q + d) * get(key + d);
      for (int64_t d = whole; d < D; d++) rest[j] += q[d] * get1(key + d);
    }
    const F32 four = sums(lanes[0], lanes[1], lanes[2], lanes[3]);
    for (int j = 0; j < 4; j++) scores[s + j] = (four[4 * j] + rest[j]) * scale;
  }
  const int64_t padded = (length + LANES - 1) / LANES * LANES;
  for (int64_t s = length; s < padded; s++) scores[s] = -INFINITY;
  for (int64_t s = 0; s < padded; s += LANES) {
    F32 v = load<F32>(scores + s);
    most = v > most ? v : most;
  }
  const float top = largest(most);
  F32 total = {};
  for (int64_t s = 0; s < padded; s += LANES) {
    F32 v = exp(load<F32>(scores + s) - top);
    store(scores + s, v);
  }
  for (int64_t s = length; s < padded; s++) scores[s] = 0;
  for (int64_t s = 0; s < padded; s += LANES) total += load<F32>(scores + s);
  const float inverse = 1.0f / sum(total);
  int64_t d = 0;
  for (; d + 4 * LANES <= whole; d += 4 * LANES) {
    F32 acc[4] = {};
    for (int64_t s = 0; s < length; s++)
      for (int j = 0; j < 4; j++) acc[j] += scores[s] * get(values + s * D + d + j * LANES);
    for (int j = 0; j < 4; j++) store(y + d + j * LANES, acc[j] * inverse);
  }
  for (; d < whole; d += LANES) {
    F32 acc = {};
    for (int64_t s = 0; s < length; s++) acc += scores[s] * get(values + s * D + d);
    store(y + d, acc * inverse);
  }
  for (; d < D; d++) {
    float acc = 0;
    for (int64_t s = 0; s < length; s++) acc += scores[s] * get1(values + s * D + d);
    y[d] = acc * inverse;
  }
}

// One head of one row: cache the new keys and values, then attend for every new token. qkv (T, 3C), y (T, C).
template <class T>
void head(T *keys, T *values, const float *qkv, int64_t count, int64_t start, int64_t C, int64_t D, float *scores, float *y) {
  for (int64_t t = 0; t < count; t++)
    for (int64_t d = 0; d < D; d++) {
      set1(keys + (start + t) * D + d, qkv[t * 3 * C + C + d]);
      set1(values + (start + t) * D + d, qkv[t * 3 * C + 2 * C + d]);
    }
  for (int64_t t = 0; t < count; t++) attend<T>(qkv + t * 3 * C, keys, values, start + t + 1, D, scores, y + t * C);
}

void look_up(const Matrix &table, int64_t row, float *x, bool add) {
  const int64_t n = table.in;
  for (int64_t i = 0; i < n; i++) {
    float value = table.kind == FLOAT32 ? ((const float *)table.weight)[row * n + i]
                                        : widen(((const uint16_t *)table.weight)[row * n + i]);
    x[i] = add ? x[i] + value : value;
  }
}

}  // namespace

extern "C" {

// sizeof(Matrix), (Layer), (Model), (Cache): structs.py compares them with its own.
void gpt2_struct_sizes(int64_t *sizes) {
  const size_t own[] = {sizeof(Matrix), sizeof(Layer), sizeof(Model), sizeof(Cache)};
  std::copy(std::begin(own), std::end(own), sizes);
}

// tokens (rows, count) -> hidden (rows, count, C), which continue the rows of the cache from starts (rows).
void gpt2_hidden_states(const Model *model, const Cache *cache, const int64_t *tokens, const int64_t *starts,
                        int64_t rows, int64_t count, float *hidden) {
  const Model &m = *model;
  const int64_t C = m.n_embd, D = C / m.n_head, N = rows * count;
  int64_t longest = 0;
  for (int64_t r = 0; r < rows; r++) longest = std::max(longest, starts[r] + count);
  std::vector<float> x(N * C), normed(N * C), qkv(N * 3 * C), y(N * C), inner(N * m.n_inner);
  Operand operand;
#pragma omp parallel num_threads(m.threads)
  {
    std::vector<float> scores(longest + LANES);
#pragma omp for
    for (int64_t n = 0; n < N; n++) {
      look_up(m.wte, tokens[n], &x[n * C], false);
      look_up(m.wpe, starts[n / count] + n % count, &x[n * C], true);
    }
    auto prepare = [&](const Matrix &w, const float *from) {
#pragma omp single
      {
        operand.shape(w, N);
        operand.f32 = from;
      }
    };
    auto convert = [&](const Matrix &w, const float *from) {
      prepare(w, from);
      if (w.kind == FLOAT32) return;
#pragma omp for
      for (int64_t n = 0; n < N; n++) operand.convert(w, n, from + n * w.in);
    };
    auto convert_normed = [&](const Matrix &w, const float *weight, const float *bias) {
      prepare(w, normed.data());
#pragma omp for
      for (int64_t n = 0; n < N; n++) {
        layer_norm(&x[n * C], weight, bias, m.epsilon, C, &normed[n * C]);
        operand.convert(w, n, &normed[n * C]);
      }
    };
    for (int32_t l = 0; l < m.n_layer; l++) {
      const Layer &layer = m.layers[l];
      convert_normed(layer.c_attn, layer.ln_1_weight, layer.ln_1_bias);
      product(layer.c_attn, operand, N, {qkv.data(), 3 * C, STORE, 0}, m.threads);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < rows * m.n_head; task++) {
        const int64_t r = task / m.n_head, h = task % m.n_head;
        const int64_t at = l * cache->layer_stride + r * cache->row_stride + h * cache->head_stride;
        const float *from = &qkv[r * count * 3 * C + h * D];
        float *to = &y[r * count * C + h * D];
        if (cache->kind == FLOAT32) {
          float *keys = (float *)cache->data + at;
          head<float>(keys, keys + cache->value_stride, from, count, starts[r], C, D, scores.data(), to);
        } else {
          uint16_t *keys = (uint16_t *)cache->data + at;
          head<uint16_t>(keys, keys + cache->value_stride, from, count, starts[r], C, D, scores.data(), to);
        }
      }
      convert(layer.c_proj, y.data());
      product(layer.c_proj, operand, N, {x.data(), C, ADD, 0}, m.threads);
      convert_normed(layer.c_fc, layer.ln_2_weight, layer.ln_2_bias);
      product(layer.c_fc, operand, N, {inner.data(), m.n_inner, ACTIVATE, m.activation}, m.threads);
      convert(layer.mlp_c_proj, inner.data());
      product(layer.mlp_c_proj, operand, N, {x.data(), C, ADD, 0}, m.threads);
    }
#pragma omp for
    for (int64_t n = 0; n < N; n++)
      layer_norm(&x[n * C], m.ln_f_weight, m.ln_f_bias, m.epsilon, C, hidden + n * C);
  }
}

// hidden (count, C) -> logits (count, V).
void gpt2_head(const Matrix *head, const float *hidden, int64_t count, int32_t threads, float *logits) {
  Operand operand;
  operand.shape(*head, count);
  operand.f32 = hidden;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t n = 0; n < count; n++) operand.convert(*head, n, hidden + n * head->in);
    product(*head, operand, count, {logits, head->out, STORE, 0}, threads);
  }
}

}  // extern "C"
