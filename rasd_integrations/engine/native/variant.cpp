// Compiled once for each set of instructions, with RASD_VARIANT as its name.
#include "kernel.hpp"

namespace rasd {
void RASD_VARIANT(const Step& step, Parallel parallel, int32_t threads) { attend(step, parallel, threads); }
}  // namespace rasd
