// Finds variants that this processor can run; the file itself has no instructions beyond the base set.
#include <cstring>

#include "attention.hpp"
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rasd {

void base(const Step&, Parallel, int32_t);
#if defined(__x86_64__)
// Null where the compiler does not know their instructions.
[[gnu::weak]] void avx2(const Step&, Parallel, int32_t);
[[gnu::weak]] void avx512(const Step&, Parallel, int32_t);
[[gnu::weak]] void avx512_bf16(const Step&, Parallel, int32_t);
[[gnu::weak]] void amx_bf16(const Step&, Parallel, int32_t);
#endif

namespace {

struct Variant {
    const char* name;
    Attend attend;
    bool can_run;
};

#if defined(__x86_64__)
// The processor has tiles of bfloat16 (CPUID 7: EDX 22 and 24), and the kernel keeps them for this process when asked.
bool has_tiles() {
    constexpr unsigned WANTED = 1u << 22 | 1u << 24;
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & WANTED) == WANTED && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
#endif

const Variant* all(int& count) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    static const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
    static const Variant variants[] = {
        {"base", base, true},
        {"avx2", avx2, has_avx2},
        {"avx512", avx512, has_avx512},
        {"avx512_bf16", avx512_bf16, has_bf16},
        {"amx_bf16", amx_bf16, has_bf16 && has_tiles()},
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
        if (variants[i].can_run && std::strcmp(variants[i].name, name) == 0) return variants[i].attend;  // may be null
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
