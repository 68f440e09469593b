// Attention of a step's rows over keys and values in memory, several answers at a time; the step's own are written first.
//
// All arrays are row-major, the last index runs fastest:
//   query   [kv_heads, rows, group, key_dim] float, of the step
//   key     [kv_heads, rows, key_dim] float, of the step; value alike
//   out     [kv_heads, rows, group, value_dim] float
//   depths  [n] int32 of one answer: how many positions a row is behind the prefix's end
//   sees    [n, n] bytes of one answer, nonzero where a row sees a column; null: a chain
// Memory is kept as it is multiplied, in blocks of 16 rows of a head (the Python side: engine/kv/packed.py):
//   keys    [kv_heads, capacity / 16, key_dim, 16] float, or [kv_heads, capacity / 16, key_dim / 2, 16, 2] bfloat16
//   values  [kv_heads, capacity, value_dim] float, or [kv_heads, capacity / 2, value_dim, 2] bfloat16
// key_dim and value_dim are multiples of 16, first and capacity of BLOCK_ROWS. An answer's rows are one run, the same in
// each head: committed ones first, the step's behind. Of bfloat16 values one more row may be zeroed behind them.
#pragma once
#include <cstdint>

namespace rasd {

constexpr int64_t BLOCK_ROWS = 16;

enum class Kind : int32_t { f32, bf16 };

struct Layer {
    int32_t kv_heads, group, key_dim, value_dim;
    float scale;
    float softcap;       // 0: none
    int32_t window;      // positions that a row sees, its own included; 0: all
    const float* sinks;  // [kv_heads * group] scores without a value; null: none
    Kind kind;           // of the memory
};

struct Answer {
    int64_t first;   // its first row in the memory
    int64_t prefix;  // committed rows
    int64_t rows;    // of the step
    const int32_t* depths;
    const uint8_t* sees;
};

struct Step {
    Layer layer;
    int64_t rows;  // of all answers
    const float *query, *key, *value;
    float* out;
    void *keys, *values;  // memory
    int64_t capacity;     // rows of a head
    const Answer* answers;
    int32_t num_answers;
};

// Calls body(context, index) for each index below count, on any threads, and returns when all are done.
using Parallel = void (*)(int64_t count, void (*body)(void* context, int64_t index), void* context);

// Write keys and values of the step to the memory, then attend. `threads` is how many may run at a time.
using Attend = void (*)(const Step& step, Parallel parallel, int32_t threads);

Attend attention_of(const char* name);  // null if the processor or the build has none of that name

}  // namespace rasd
