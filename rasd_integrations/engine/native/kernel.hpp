// The kernel, compiled once for each set of instructions; attention.hpp states the layouts.
//
// The query vectors that share a key head are the rows of two small matrix products, scores = Q K^T and out = P V, over
// tiles of keys with a running maximum (online softmax). Tasks are (answer, key head, block of query vectors, part of the
// keys); parts are joined by their log-sum-exps. How keys are parted depends on one answer alone, so an answer's rounding
// does not depend on the others in its step.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "lanes.hpp"
#if defined(__AMX_BF16__)
#include "tiles.hpp"
#endif

namespace rasd {
namespace {

constexpr int64_t TILE = 128;  // keys
constexpr int64_t BLOCK = 48;  // query vectors of a task; whole tiles of AMX
constexpr int64_t PART = 512;  // keys of a task at least
constexpr int WIDE = W == 16 ? 4 : 2;  // registers of a column block of a product
constexpr int TALL = 6;                // rows of one

constexpr int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Offset of lane column j * W where every 16 columns are `block` cells apart.
constexpr int64_t column(int64_t j, int64_t block) { return j * W / 16 * block + j * W % 16; }

// Unrolled before registers are assigned: rolled loops over arrays of registers keep them in memory.
#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < n; i++)

// c[R][C * W] (+)= a[R][k * E::STEP] b[k][C * W]; strides in numbers of each.
template <class E, int R, int C>
inline void tile(const typename E::Left* a, int64_t lda, const typename E::Cell* b, int64_t block, int64_t ldb, float* c, int64_t ldc, int64_t k, bool adds) {
    vf sum[R][C];
    EACH(r, R) EACH(j, C) sum[r][j] = adds ? load<vf>(c + r * ldc + j * W) : vf{};
    for (int64_t i = 0; i < k; i++) {
        typename E::Right right[C];
        EACH(j, C) right[j] = E::right(b + i * ldb + column(j, block));
        EACH(r, R) EACH(j, C) sum[r][j] = E::product(sum[r][j], a + r * lda + i * E::STEP, right[j]);
    }
    EACH(r, R) EACH(j, C) store(c + r * ldc + j * W, sum[r][j]);
}
template <class E, int C>
void columns(int64_t rows, const typename E::Left* a, int64_t lda, const typename E::Cell* b, int64_t block, int64_t ldb, float* c, int64_t ldc, int64_t k, bool adds) {
    for (; rows >= TALL; rows -= TALL, a += TALL * lda, c += TALL * ldc) tile<E, TALL, C>(a, lda, b, block, ldb, c, ldc, k, adds);
    switch (rows) {
        case 5: return tile<E, 5, C>(a, lda, b, block, ldb, c, ldc, k, adds);
        case 4: return tile<E, 4, C>(a, lda, b, block, ldb, c, ldc, k, adds);
        case 3: return tile<E, 3, C>(a, lda, b, block, ldb, c, ldc, k, adds);
        case 2: return tile<E, 2, C>(a, lda, b, block, ldb, c, ldc, k, adds);
        case 1: return tile<E, 1, C>(a, lda, b, block, ldb, c, ldc, k, adds);
        default: return;
    }
}
template <class E>
void multiply(int64_t rows, const typename E::Left* a, int64_t lda, const typename E::Cell* b, int64_t block, int64_t ldb, float* c, int64_t ldc, int64_t k, int64_t cols, bool adds) {
    int64_t j = 0, registers = cols / W;
    for (; j + WIDE <= registers; j += WIDE) columns<E, WIDE>(rows, a, lda, b + column(j, block), block, ldb, c + j * W, ldc, k, adds);
    for (; j < registers; j++) columns<E, 1>(rows, a, lda, b + column(j, block), block, ldb, c + j * W, ldc, k, adds);
}

// Products of a task, in whatever registers its thread has for them.
template <class E>
struct Products {
    void multiply(int64_t rows, const typename E::Left* a, int64_t lda, const typename E::Cell* b, int64_t block, int64_t ldb, float* c, int64_t ldc, int64_t k, int64_t cols, bool adds) {
        rasd::multiply<E>(rows, a, lda, b, block, ldb, c, ldc, k, cols, adds);
    }
};
#if defined(__AMX_BF16__)
template <>
struct Products<Pair> {
    Tiles registers;
    void multiply(int64_t rows, const uint16_t* a, int64_t lda, const uint32_t* b, int64_t block, int64_t ldb, float* c, int64_t ldc, int64_t k, int64_t cols, bool adds) {
        multiply_in_tiles(registers, rows, reinterpret_cast<const uint32_t*>(a), lda / 2, b, block, ldb, c, ldc, k, cols, adds);
    }
};
#endif

// One thread's memory, reused.
template <class E>
struct Scratch {
    std::vector<typename E::Left> query, weights;
    std::vector<float> scores;
    void fit(const Layer& l) {
        query.resize(BLOCK * l.key_dim);
        weights.resize(BLOCK * TILE);
        scores.resize(BLOCK * TILE);
    }
};

struct Task {
    int32_t answer, kv_head, block, part;
};

// What a task leaves: out [vectors][value_dim] not divided, the maxima and sums of its query vectors.
struct Part {
    float *out, *most, *sum;
};

struct Plan {
    struct Blocks {
        int64_t first_row, vectors, blocks, parts, part_keys, slot;
    };
    const Step& step;
    std::vector<Task> tasks;
    std::vector<Blocks> answers;
    std::vector<float> memory;  // of all parts

    // The first query vector of an answer at a key head.
    int64_t vector(const Blocks& b, int64_t kv_head) const { return (kv_head * step.rows + b.first_row) * step.layer.group; }

    Part part(const Blocks& b, int64_t kv_head, int64_t block, int64_t part) {
        int64_t slot = b.slot + (kv_head * b.blocks + block) * b.parts + part, value = step.layer.value_dim;
        float* at = memory.data() + slot * BLOCK * (value + 2);
        return {at, at + BLOCK * value, at + BLOCK * (value + 1)};
    }
};

// First and last key (excluded) that a row of an answer can see, first of the prefix in a tree.
inline int64_t seen_from(const Answer& a, int64_t row, int32_t window) {
    int64_t first = window ? std::max<int64_t>(0, a.prefix + a.depths[row] + 1 - window) : 0;
    return a.sees ? std::min(first, a.prefix) : first;
}
inline int64_t seen_to(const Answer& a, int64_t row) { return a.sees ? a.prefix + a.rows : a.prefix + row + 1; }

// Take what a row does not see out of its scores of the `n` keys from `start` on, and what is behind them.
inline void hide(const Answer& a, int64_t row, int32_t window, int64_t start, int64_t n, float* score) {
    int64_t from = std::min(n, std::max<int64_t>(0, seen_from(a, row, window) - start));
    int64_t till = std::min(n, std::max<int64_t>(0, seen_to(a, row) - start));
    for (int64_t i = 0; i < from; i++) score[i] = -INFINITY;
    if (a.sees)
        for (int64_t i = std::max<int64_t>(0, a.prefix - start); i < till; i++) {
            int64_t other = start + i - a.prefix;
            bool is_far = window && a.depths[other] + window <= a.depths[row];
            if (is_far || !a.sees[row * a.rows + other]) score[i] = -INFINITY;
        }
    for (int64_t i = till; i < rounded(n, BLOCK_ROWS); i++) score[i] = -INFINITY;
}

// Turn the `n` scores of a tile, a multiple of 16, into weights; what is in `out` is scaled to the new maximum.
template <class E>
void weigh(float* score, int64_t n, float scale, int64_t value_dim, float* out, float* most, float* sum, typename E::Left* weights) {
    vf top = splat(-INFINITY);
    for (int64_t i = 0; i < n; i += W) top = larger(top, load<vf>(score + i));
    float highest = std::max(*most, largest(top) * scale);
    if (highest == -INFINITY) {  // it sees no key of this tile, nor saw one before
        std::memset(weights, 0, n * sizeof *weights);
        return;
    }
    if (highest > *most) {
        vf less = splat(std::exp(*most - highest));
        for (int64_t d = 0; d < value_dim; d += W) store(out + d, load<vf>(out + d) * less);
        *sum *= less[0];
        *most = highest;
    }
    vf added{}, by = splat(scale), minus = splat(highest);
    for (int64_t i = 0; i < n; i += W) {
        vf weight = exp_of(load<vf>(score + i) * by - minus);
        added += weight;
        E::left(weight, weights + i);
    }
    *sum += total(added);
}

// Prefetch part `index` of `parts` of `count` cells.
template <class Cell>
inline void prefetch(const Cell* from, int64_t count, int64_t index, int64_t parts) {
    constexpr int64_t LINE = 64 / sizeof(Cell);
    int64_t lines = count / LINE;
    for (int64_t i = lines * index / parts; i < lines * (index + 1) / parts; i++) __builtin_prefetch(from + i * LINE, 0, 2);
}

template <class E>
void run(Plan& plan, const Task& task) {
    static thread_local Scratch<E> s;
    Products<E> products;
    const Step& step = plan.step;
    const Layer& l = step.layer;
    const Answer& a = step.answers[task.answer];
    const Plan::Blocks& b = plan.answers[task.answer];
    s.fit(l);
    int64_t first = task.block * BLOCK, vectors = std::min<int64_t>(BLOCK, b.vectors - first);
    Part to = plan.part(b, task.kv_head, task.block, task.part);
    std::fill(to.out, to.out + vectors * l.value_dim, 0.f);
    std::fill(to.most, to.most + vectors, -INFINITY);
    std::fill(to.sum, to.sum + vectors, 0.f);
    const float* query = step.query + (plan.vector(b, task.kv_head) + first) * l.key_dim;
    for (int64_t i = 0; i < vectors * l.key_dim; i += W) E::left(load<vf>(query + i), s.query.data() + i);
    int64_t top = first / l.group, bottom = (first + vectors - 1) / l.group;
    int64_t least = seen_from(a, top, l.window), most = least;
    for (int64_t row = top + 1; row <= bottom; row++) {
        least = std::min(least, seen_from(a, row, l.window));
        most = std::max(most, seen_from(a, row, l.window));
    }
    int64_t start = std::max(task.part * b.part_keys, least / BLOCK_ROWS * BLOCK_ROWS);
    int64_t end = std::min(seen_to(a, bottom), (task.part + 1) * b.part_keys);
    int64_t memory = task.kv_head * step.capacity + a.first;
    const auto* keys = static_cast<const typename E::Cell*>(step.keys) + memory * l.key_dim / E::STEP;
    const auto* values = static_cast<const typename E::Cell*>(step.values) + memory * l.value_dim / E::STEP;
    int64_t block = BLOCK_ROWS * l.key_dim / E::STEP;
    for (int64_t t = start; t < end; t += TILE) {
        int64_t n = std::min<int64_t>(TILE, end - t), wide = rounded(n, BLOCK_ROWS);
        products.multiply(vectors, s.query.data(), l.key_dim, keys + t / BLOCK_ROWS * block, block, BLOCK_ROWS, s.scores.data(), TILE, l.key_dim / E::STEP, wide, false);
        bool more = t + TILE < end;
        bool sees_all = n == wide && t + n <= a.prefix + (a.sees ? 0 : top + 1) && most <= t;
        for (int64_t v = 0; v < vectors; v++) {
            float* score = s.scores.data() + v * TILE;
            if (more) {  // a share of the next tile: hardware does not prefetch over the end of a page
                prefetch(keys + (t + TILE) / BLOCK_ROWS * block, TILE * l.key_dim / E::STEP, v, vectors);
                prefetch(values + (t + TILE) / E::STEP * l.value_dim, TILE * l.value_dim / E::STEP, v, vectors);
            }
            if (l.softcap)
                for (int64_t i = 0; i < wide; i += W) store(score + i, capped(load<vf>(score + i) * splat(l.scale), l.softcap));
            if (!sees_all) hide(a, (first + v) / l.group, l.window, t, n, score);
            weigh<E>(score, wide, l.softcap ? 1 : l.scale, l.value_dim, to.out + v * l.value_dim, to.most + v, to.sum + v, s.weights.data() + v * TILE);
        }
        products.multiply(vectors, s.weights.data(), TILE, values + t / E::STEP * l.value_dim, 16, l.value_dim, to.out, l.value_dim, rounded(n, E::STEP) / E::STEP, l.value_dim, true);
    }
}

// Join the parts of a block of query vectors and write their outputs.
void join(Plan& plan, const Plan::Blocks& b, int64_t kv_head, int64_t block) {
    const Layer& l = plan.step.layer;
    int64_t first = block * BLOCK, vectors = std::min<int64_t>(BLOCK, b.vectors - first);
    for (int64_t v = 0; v < vectors; v++) {
        int64_t head = kv_head * l.group + (first + v) % l.group;
        float most = l.sinks ? l.sinks[head] : -INFINITY;
        for (int64_t p = 0; p < b.parts; p++) most = std::max(most, plan.part(b, kv_head, block, p).most[v]);
        float sum = l.sinks ? std::exp(l.sinks[head] - most) : 0;
        float* out = plan.step.out + (plan.vector(b, kv_head) + first + v) * l.value_dim;
        std::fill(out, out + l.value_dim, 0.f);
        for (int64_t p = 0; p < b.parts; p++) {
            Part part = plan.part(b, kv_head, block, p);
            if (part.most[v] == -INFINITY) continue;
            float weight = std::exp(part.most[v] - most);
            sum += weight * part.sum[v];
            for (int64_t d = 0; d < l.value_dim; d++) out[d] += weight * part.out[v * l.value_dim + d];
        }
        for (int64_t d = 0; d < l.value_dim; d++) out[d] /= sum;
    }
}

// Write the step's keys and values of one answer's head.
template <class E>
void append(const Step& step, int64_t first_row, const Answer& a, int64_t kv_head) {
    const Layer& l = step.layer;
    auto* keys = static_cast<typename E::Number*>(step.keys) + (kv_head * step.capacity + a.first) * l.key_dim;
    auto* values = static_cast<typename E::Number*>(step.values) + (kv_head * step.capacity + a.first) * l.value_dim;
    for (int64_t i = 0; i < a.rows; i++) {
        int64_t row = a.prefix + i, from = kv_head * step.rows + first_row + i;
        const float *key = step.key + from * l.key_dim, *value = step.value + from * l.value_dim;
        auto* k = keys + row / BLOCK_ROWS * BLOCK_ROWS * l.key_dim + row % BLOCK_ROWS * E::STEP;
        for (int64_t d = 0; d < l.key_dim; d++) k[d / E::STEP * E::STEP * BLOCK_ROWS + d % E::STEP] = E::number(key[d]);
        auto* v = values + row / E::STEP * E::STEP * l.value_dim + row % E::STEP;
        for (int64_t d = 0; d < l.value_dim; d++) v[d * E::STEP] = E::number(value[d]);
    }
    int64_t end = a.prefix + a.rows;
    if (end % E::STEP)  // weighed by zero, but it may hold a NaN
        for (int64_t d = 0; d < l.value_dim; d++) values[end / E::STEP * E::STEP * l.value_dim + d * E::STEP + 1] = {};
}

template <class E>
void attend_in(const Step& step, Parallel parallel, int32_t threads) {
    const Layer& l = step.layer;
    static thread_local std::vector<float> kept;
    Plan plan{step, {}, {}, {}};
    plan.memory.swap(kept);
    int64_t row = 0, slots = 0;
    for (int32_t i = 0; i < step.num_answers; i++) {
        const Answer& a = step.answers[i];
        int64_t vectors = a.rows * l.group, blocks = (vectors + BLOCK - 1) / BLOCK, end = a.prefix + a.rows;
        int64_t tasks = l.kv_heads * blocks, parts = 1;
        if (threads > 1) parts = std::max<int64_t>(1, std::min((3 * threads + tasks - 1) / tasks, end / PART));
        int64_t part_keys = rounded((end + parts - 1) / parts, TILE);
        parts = (end + part_keys - 1) / part_keys;
        plan.answers.push_back({row, vectors, blocks, parts, part_keys, slots});
        for (int32_t h = 0; h < l.kv_heads; h++)
            for (int32_t b = 0; b < blocks; b++)
                for (int32_t p = 0; p < parts; p++) plan.tasks.push_back({i, h, b, p});
        slots += tasks * parts;
        row += a.rows;
    }
    int64_t floats = slots * BLOCK * (l.value_dim + 2);
    if (int64_t(plan.memory.size()) < floats) plan.memory.resize(floats);
    for (int32_t i = 0; i < step.num_answers; i++)
        for (int64_t h = 0; h < l.kv_heads; h++) append<E>(step, plan.answers[i].first_row, step.answers[i], h);
    parallel(
        int64_t(plan.tasks.size()),
        [](void* context, int64_t i) {
            Plan& plan = *static_cast<Plan*>(context);
            const Task& task = plan.tasks[i];
            const Plan::Blocks& b = plan.answers[task.answer];
            run<E>(plan, task);
            if (b.parts == 1) join(plan, b, task.kv_head, task.block);
        },
        &plan);
    for (const Plan::Blocks& b : plan.answers)
        for (int64_t h = 0; b.parts > 1 && h < l.kv_heads; h++)
            for (int64_t k = 0; k < b.blocks; k++) join(plan, b, h, k);
    plan.memory.swap(kept);
}

void attend(const Step& step, Parallel parallel, int32_t threads) {
    if (step.layer.kind == Kind::f32)
        attend_in<Single>(step, parallel, threads);
    else
        attend_in<Pair>(step, parallel, threads);
}

}  // namespace
}  // namespace rasd
