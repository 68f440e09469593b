// Registers of this set of instructions, and how numbers of each kind of memory are multiplied in them.
#pragma once
#include <cmath>
#include <cstring>

#include "attention.hpp"

#if defined(__AVX512F__)
#include <immintrin.h>
#define RASD_LANES 16
#elif defined(__AVX2__)
#define RASD_LANES 8
#else
#define RASD_LANES 4
#endif

namespace rasd {
namespace {

constexpr int W = RASD_LANES;

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));

template <class V, class T>
inline V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
template <class V, class T>
inline void store(T* to, V v) {
    std::memcpy(to, &v, sizeof v);
}
inline vf splat(float x) { return x - vf{}; }

inline vf larger(vf a, vf b) {
#if RASD_LANES == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

inline float largest(vf v) {
#if RASD_LANES == 16
    return _mm512_reduce_max_ps((__m512)v);
#else
    float most = v[0];
    for (int i = 1; i < W; i++) most = v[i] > most ? v[i] : most;
    return most;
#endif
}
inline float total(vf v) {
#if RASD_LANES == 16
    return _mm512_reduce_add_ps((__m512)v);
#else
    float sum = 0;
    for (int i = 0; i < W; i++) sum += v[i];
    return sum;
#endif
}

// exp of numbers up to 0, relative error 2e-7 near it (2^f by a polynomial of degree 6); below -87 as of -87, 1e-38.
inline vf exp_of(vf x) {
    x = larger(x, splat(-87.f));
    vf t = x * splat(1.44269504f);
#if RASD_LANES == 16
    vf n = (vf)_mm512_roundscale_ps((__m512)t, 0);
#else
    vi whole = __builtin_convertvector(t - splat(0.5f), vi);
    vf n = __builtin_convertvector(whole, vf);
#endif
    vf f = t - n;
    vf p = splat(1.5403530e-4f);
    p = p * f + splat(1.3333558e-3f);
    p = p * f + splat(9.6181291e-3f);
    p = p * f + splat(5.5504109e-2f);
    p = p * f + splat(2.4022651e-1f);
    p = p * f + splat(6.9314718e-1f);
    p = p * f + splat(1.f);
#if RASD_LANES == 16
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * (vf)((whole + 127) << 23);
#endif
}

// cap * tanh(x / cap)
inline vf capped(vf x, float cap) {
    vf small = exp_of((x < 0 ? x : -x) * splat(2 / cap));
    vf size = splat(cap) * (1 - small) / (1 + small);
    return x < 0 ? -size : size;
}

// Memory of floats.
struct Single {
    using Number = float;
    using Cell = float;  // of one column of a product's right side
    using Right = vf;
    using Left = float;              // of a row of its left side
    static constexpr int STEP = 1;  // numbers of a cell, along the sum
    static Number number(float x) { return x; }
    static void left(vf from, Left* to) { store(to, from); }
    static Right right(const Cell* from) { return load<vf>(from); }
    static vf product(vf sum, const Left* a, Right b) { return sum + splat(*a) * b; }
};

// Memory of bfloat16: a cell is a pair.
struct Pair {
    using Number = uint16_t;
    using Cell = uint32_t;
    static constexpr int STEP = 2;
    static Number number(float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);
        return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
#if defined(__AVX512BF16__)
    using Left = uint16_t;  // rounded, in pairs
    using Right = vu;
    static void left(vf from, Left* to) { store(to, _mm512_cvtneps_pbh((__m512)from)); }
    static Right right(const Cell* from) { return load<vu>(from); }
    static vf product(vf sum, const Left* a, Right b) {
        int32_t pair;
        std::memcpy(&pair, a, 4);
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
    }
#else
    using Left = float;
    struct Right {
        vf even, odd;
    };
    static void left(vf from, Left* to) { store(to, from); }
    static Right right(const Cell* from) {
        vu both = load<vu>(from);
        return {(vf)(both << 16), (vf)(both & 0xffff0000u)};
    }
    static vf product(vf sum, const Left* a, Right b) { return sum + splat(a[0]) * b.even + splat(a[1]) * b.odd; }
#endif
};

}  // namespace
}  // namespace rasd
