// Products of bfloat16 pairs in AMX's tiles: 16 rows by 16 columns by 16 pairs an instruction.
//
// Left sides have whole tiles of 16 rows; those behind a product's own hold anything, and so do its results there.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <initializer_list>

namespace rasd {
namespace {

constexpr int64_t SIDE = 16;  // rows, columns and pairs of a tile

// Tile loads do not tell the compiler what they read: what was stored before must be in memory by now.
inline void written(const void* local = nullptr) { __asm__ volatile("" : : "r"(local) : "memory"); }

// What the tile registers of a thread hold: 0 to 3 sums, 4 a left side, 5 to 7 right sides, of `pairs` pairs.
class Tiles {
    struct alignas(64) Config {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};  // of a row of each register
        uint8_t rows[16] = {};
    };
    int64_t pairs_ = 0;

public:
    ~Tiles() { _tile_release(); }  // the next operation on this thread finds them unused
    void configure(int64_t pairs) {
        if (pairs == pairs_) return;
        pairs_ = pairs;
        Config config;
        for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = SIDE;
        config.bytes[4] = uint16_t(pairs * 4);
        for (int i : {5, 6, 7}) config.rows[i] = uint8_t(pairs);
        written(&config);
        _tile_loadconfig(&config);
    }
};

// c[16][C * 16] (+)= a[16][steps * pairs] b[steps * pairs][C * 16]; strides in cells of each, of two bfloat16 or a float.
template <int C>
inline void tiles(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t block, int64_t ldb, float* c, int64_t ldc, int64_t steps, bool adds) {
    if (adds) {
        _tile_loadd(0, c, 4 * ldc);
        if constexpr (C > 1) _tile_loadd(1, c + SIDE, 4 * ldc);
        if constexpr (C > 2) _tile_loadd(2, c + 2 * SIDE, 4 * ldc);
        if constexpr (C > 3) _tile_loadd(3, c + 3 * SIDE, 4 * ldc);
    } else {
        _tile_zero(0);
        if constexpr (C > 1) _tile_zero(1);
        if constexpr (C > 2) _tile_zero(2);
        if constexpr (C > 3) _tile_zero(3);
    }
    for (int64_t i = 0; i < steps; i++, a += SIDE, b += SIDE * ldb) {
        _tile_loadd(4, a, 4 * lda);
        _tile_loadd(5, b, 4 * ldb);
        _tile_dpbf16ps(0, 4, 5);
        if constexpr (C > 1) {
            _tile_loadd(6, b + block, 4 * ldb);
            _tile_dpbf16ps(1, 4, 6);
        }
        if constexpr (C > 2) {
            _tile_loadd(7, b + 2 * block, 4 * ldb);
            _tile_dpbf16ps(2, 4, 7);
        }
        if constexpr (C > 3) {
            _tile_loadd(5, b + 3 * block, 4 * ldb);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    _tile_stored(0, c, 4 * ldc);
    if constexpr (C > 1) _tile_stored(1, c + SIDE, 4 * ldc);
    if constexpr (C > 2) _tile_stored(2, c + 2 * SIDE, 4 * ldc);
    if constexpr (C > 3) _tile_stored(3, c + 3 * SIDE, 4 * ldc);
}

// The same for any rows, columns (a multiple of 16) and pairs; `lda` in pairs.
inline void multiply_in_tiles(Tiles& registers, int64_t rows, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t block, int64_t ldb, float* c, int64_t ldc, int64_t pairs, int64_t cols, bool adds) {
    int64_t whole = pairs / SIDE, rest = pairs % SIDE, blocks = cols / SIDE;
    written();
    auto each = [&](const uint32_t* left, const uint32_t* right, int64_t steps, bool adds) {
        for (int64_t r = 0; r < rows; r += SIDE) {
            const uint32_t *at = left + r * lda, *of = right;
            float* to = c + r * ldc;
            int64_t j = 0;
            for (; j + 4 <= blocks; j += 4, of += 4 * block, to += 4 * SIDE) tiles<4>(at, lda, of, block, ldb, to, ldc, steps, adds);
            if (blocks - j == 3) tiles<3>(at, lda, of, block, ldb, to, ldc, steps, adds);
            if (blocks - j == 2) tiles<2>(at, lda, of, block, ldb, to, ldc, steps, adds);
            if (blocks - j == 1) tiles<1>(at, lda, of, block, ldb, to, ldc, steps, adds);
        }
    };
    if (whole) {
        registers.configure(SIDE);
        each(a, b, whole, adds);
    }
    if (rest) {
        registers.configure(rest);
        each(a + whole * SIDE, b + whole * SIDE * ldb, 1, adds || whole);
    }
}

}  // namespace
}  // namespace rasd
