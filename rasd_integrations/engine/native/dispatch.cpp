// Finds variants that this processor can run; the file itself has no instructions beyond the base set.
#include <cstring>

#include "attention.hpp"

namespace rasd {

void base(const Step&, Parallel, int32_t);
#if defined(__x86_64__)
void avx2(const Step&, Parallel, int32_t);
void avx512(const Step&, Parallel, int32_t);
void avx512_bf16(const Step&, Parallel, int32_t);
#endif

namespace {

struct Variant {
    const char* name;
    Attend attend;
    bool can_run;
};

const Variant* all(int& count) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    static const Variant variants[] = {
        {"base", base, true},
        {"avx2", avx2, has_avx2},
        {"avx512", avx512, has_avx512},
        {"avx512_bf16", avx512_bf16, has_avx512 && __builtin_cpu_supports("avx512bf16")},
    };
#else
    static const Variant variants[] = {{"base", base, true}};
#endif
    count = sizeof variants / sizeof *variants;
    return variants;
}

}  // namespace

Attend attention_of(const char* name) {
    int count;
    const Variant* variants = all(count);
    for (int i = 0; i < count; i++)
        if (variants[i].can_run && std::strcmp(variants[i].name, name) == 0) return variants[i].attend;
    return nullptr;
}

}  // namespace rasd

extern "C" int rasd_can_run(const char* variant) { return rasd::attention_of(variant) != nullptr; }

// For tests: attend on the caller's thread.
extern "C" void rasd_attend(const char* variant, const rasd::Step* step) {
    rasd::attention_of(variant)(
        *step,
        [](int64_t count, void (*body)(void*, int64_t), void* context) {
            for (int64_t i = 0; i < count; i++) body(context, i);
        },
        1);
}
