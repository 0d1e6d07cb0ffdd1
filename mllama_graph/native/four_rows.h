// Products of four rows with a panel of bf16 weights, for x86 with AVX2.
//
// Twelve sums, a panel's three vectors and an input take all 16 registers. Compilers would keep some of the sums in
// memory, which takes as long as reading the panel twice, for two rows each. So the loop is written in assembly.

#pragma once

#include "vectors.h"

namespace {

// c += a b for four rows of a and a panel b of three vectors, whose inputs are interleaved by pairs. Sums have the same
// bits as in stream_tile. Meanwhile prefetches from `next` on, which advances by `pace` elements per pair.
void add_four_rows(const float* a, int64_t a_stride, const BFloat16* b, int64_t pairs, float* c, int64_t c_stride,
                   const BFloat16* next, int64_t pace);

#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
constexpr bool kFourRows = true;

alignas(32) const Integers kHighHalves = Integers{} + static_cast<int32_t>(0xffff0000);

// Sums are in ymm0 to ymm11, weights of an input in ymm12 to ymm14, an input of a row in ymm15.
#define LOAD(row, x, y, z) \
  "vmovups (%[c]" row "), %%ymm" x "\nvmovups 32(%[c]" row "), %%ymm" y "\nvmovups 64(%[c]" row "), %%ymm" z "\n"
#define STORE(row, x, y, z) \
  "vmovups %%ymm" x ", (%[c]" row ")\nvmovups %%ymm" y ", 32(%[c]" row ")\nvmovups %%ymm" z ", 64(%[c]" row ")\n"
#define ADD(input, x, y, z)                                                              \
  "vbroadcastss " input ", %%ymm15\n"                                                    \
  "vfmadd231ps %%ymm12, %%ymm15, %%ymm" x "\nvfmadd231ps %%ymm13, %%ymm15, %%ymm" y "\n" \
  "vfmadd231ps %%ymm14, %%ymm15, %%ymm" z "\n"

[[gnu::noinline]] void add_four_rows(const float* a, int64_t a_stride, const BFloat16* b, int64_t pairs, float* c,
                                            int64_t c_stride, const BFloat16* next, int64_t pace) {
  if (!pairs) return;
  // clang-format off
  asm volatile(
      LOAD("", "0", "1", "2") LOAD(",%[c_row]", "3", "4", "5")
      LOAD(",%[c_row],2", "6", "7", "8") LOAD(",%[c_last]", "9", "10", "11")
      ".p2align 5\n"
      "1:\n"
      "prefetcht1 (%[next])\nprefetcht1 64(%[next])\n"
      "vmovdqu (%[b]), %%ymm12\nvmovdqu 32(%[b]), %%ymm13\nvmovdqu 64(%[b]), %%ymm14\n"
      "vpslld $16, %%ymm12, %%ymm12\nvpslld $16, %%ymm13, %%ymm13\nvpslld $16, %%ymm14, %%ymm14\n"
      ADD("(%[a])", "0", "1", "2") ADD("(%[a],%[a_row])", "3", "4", "5")
      ADD("(%[a],%[a_row],2)", "6", "7", "8") ADD("(%[a],%[a_last])", "9", "10", "11")
      "vmovaps %[high], %%ymm14\n"
      "vandps (%[b]), %%ymm14, %%ymm12\nvandps 32(%[b]), %%ymm14, %%ymm13\nvandps 64(%[b]), %%ymm14, %%ymm14\n"
      ADD("4(%[a])", "0", "1", "2") ADD("4(%[a],%[a_row])", "3", "4", "5")
      ADD("4(%[a],%[a_row],2)", "6", "7", "8") ADD("4(%[a],%[a_last])", "9", "10", "11")
      "addq $8, %[a]\naddq $96, %[b]\naddq %[pace], %[next]\n"
      "subq $1, %[pairs]\n"
      "jnz 1b\n"
      STORE("", "0", "1", "2") STORE(",%[c_row]", "3", "4", "5")
      STORE(",%[c_row],2", "6", "7", "8") STORE(",%[c_last]", "9", "10", "11")
      : [a] "+r"(a), [b] "+r"(b), [next] "+r"(next), [pairs] "+r"(pairs)
      : [a_row] "r"(4 * a_stride), [a_last] "r"(12 * a_stride), [c] "r"(c), [c_row] "r"(4 * c_stride),
        [c_last] "r"(12 * c_stride), [pace] "r"(2 * pace), [high] "m"(kHighHalves)
      : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
        "xmm12", "xmm13", "xmm14", "xmm15");
  // clang-format on
}

#undef LOAD
#undef STORE
#undef ADD
#else
constexpr bool kFourRows = false;
#endif

}  // namespace
