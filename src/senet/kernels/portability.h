// What depends on the compiler, the processor or the operating system: nothing outside of this file
// does, but the numbers of the register tiles, which follow from SENET_VECTOR_BYTES and
// SENET_REGISTERS.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>

// Vectors are those of GCC and Clang, which cl.exe does not have (clang-cl does).
#ifndef __GNUC__
#error "senet's kernels need GCC or Clang"
#endif

// Of what the kernels call exp for float64 alone is newer than glibc 2.17; its older version computes
// the same, and sets errno.
#if defined(__GLIBC__) && defined(__x86_64__)
asm(".symver exp, exp@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
asm(".symver exp, exp@GLIBC_2.17");
#endif

// The vector registers of the instruction set that is compiled for: their size and number.
#ifdef __AVX512F__
#define SENET_VECTOR_BYTES 64
#define SENET_REGISTERS 32
#elif defined(__AVX2__)
#define SENET_VECTOR_BYTES 32
#define SENET_REGISTERS 16
#elif defined(__aarch64__)
#define SENET_VECTOR_BYTES 16
#define SENET_REGISTERS 32
#else
#define SENET_VECTOR_BYTES 16
#define SENET_REGISTERS 16
#endif

#ifdef __x86_64__
#define SENET_X86
#ifdef __AVX2__
#include <immintrin.h>
#else
#include <emmintrin.h>  // as much smaller as the baseline's instructions are few
#endif
#endif

#define SENET_INLINE inline __attribute__((always_inline))
#define SENET_EXPORT extern "C" __attribute__((visibility("default")))

#define SENET_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define SENET_UNROLL(count) SENET_PRAGMA(unroll count)
#else
#define SENET_UNROLL(count) SENET_PRAGMA(GCC unroll count)
#endif

namespace senet {
namespace {

// Whether the processor has what CMakeLists.txt compiles the instruction sets' kernels for.
inline bool processor_has_avx2() {
#ifdef SENET_X86
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
#else
  return false;
#endif
}
inline bool processor_has_avx512() {
#ifdef SENET_X86
  return processor_has_avx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

template <class A, int W>
struct VectorOf {
  typedef A type __attribute__((vector_size(W * sizeof(A))));
};

// The lanes of a vector as other numbers, by value.
template <class To, class V>
SENET_INLINE To converted(V v) {
  return __builtin_convertvector(v, To);
}

// Lanes `I` of a and, from the number of its lanes on, of b.
template <int... I, class V>
SENET_INLINE V shuffle(V a, V b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, decltype(a < b){I...});
#endif
}

// Fetches the cache line at `p` into the second-level cache; p may lie beyond the map, a prefetch
// does not fault.
template <class T>
SENET_INLINE void fetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// The same pointer, in a register of its own: where several advance together GCC makes a vector of
// them, which it then takes apart through memory.
template <class T>
SENET_INLINE T* held(T* p) {
  asm("" : "+r"(p));
  return p;
}

// sum += x * w in the register of the sum: GCC takes that of x for it, and where sums need nearly all
// registers they wander through memory.
template <class V>
SENET_INLINE void add_to(V& sum, V x, V w) {
#ifdef __FMA__
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
#else
  sum += x * w;
#endif
}

// A non-temporal store does not read the line it overwrites; `to` must be aligned to the vector.
template <class V>
SENET_INLINE void stream(void* to, const V& v) {
#ifdef SENET_X86
  if constexpr (sizeof(V) == 16) {
    __m128i raw;
    std::memcpy(&raw, &v, 16);
    return _mm_stream_si128(static_cast<__m128i*>(to), raw);
  }
#ifdef __AVX2__
  if constexpr (sizeof(V) == 32) {
    __m256i raw;
    std::memcpy(&raw, &v, 32);
    return _mm256_stream_si256(static_cast<__m256i*>(to), raw);
  }
#endif
#ifdef __AVX512F__
  if constexpr (sizeof(V) == 64) {
    __m512i raw;
    std::memcpy(&raw, &v, 64);
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), raw);
  }
#endif
#endif
  std::memcpy(to, &v, sizeof v);
}

// The larger and the smaller of each two lanes, in one instruction; where one is NaN, that of v. (A
// mask of ones: without it GCC 12 warns of its own headers.)
template <class V>
SENET_INLINE V larger(V bound, V v) {
#ifdef __AVX512F__
  if constexpr (sizeof(V) == 64) return V(_mm512_maskz_max_ps(0xffff, __m512(bound), __m512(v)));
#endif
#ifdef __AVX2__
  if constexpr (sizeof(V) == 32) return V(_mm256_max_ps(__m256(bound), __m256(v)));
#endif
  return bound > v ? bound : v;
}
template <class V>
SENET_INLINE V smaller(V bound, V v) {
#ifdef __AVX512F__
  if constexpr (sizeof(V) == 64) return V(_mm512_maskz_min_ps(0xffff, __m512(bound), __m512(v)));
#endif
#ifdef __AVX2__
  if constexpr (sizeof(V) == 32) return V(_mm256_min_ps(__m256(bound), __m256(v)));
#endif
  return bound < v ? bound : v;
}

// 1 / v to a unit in the last place for positive v; that of infinity is 0. With 512 bits a division
// takes as long as an exponential: there it is an estimate of 14 bits and a step of Newton's.
template <class V>
SENET_INLINE V reciprocal(V v) {
#ifdef __AVX512F__
  if constexpr (sizeof(V) == 64) {
    const __m512 one = _mm512_set1_ps(1.0f), estimate = _mm512_maskz_rcp14_ps(0xffff, __m512(v));
    const __m512 error = _mm512_fnmadd_ps(__m512(v), estimate, one);
    const __mmask16 finite = _mm512_cmp_ps_mask(__m512(v), one * __builtin_inff(), _CMP_NGE_UQ);
    return V(_mm512_maskz_fmadd_ps(finite, estimate, error, estimate));
  }
#endif
  return 1.0f / v;
}

// Stores the first `count` lanes of v, fewer than it has.
template <class V>
SENET_INLINE void store_lanes(float* to, const V& v, int64_t count) {
#ifdef __AVX512F__
  if constexpr (sizeof(V) == 64) {
    __m512 raw;
    std::memcpy(&raw, &v, 64);
    return _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1u), raw);
  }
#endif
  constexpr int64_t kHalf = sizeof(V) / sizeof(float) / 2;
  const float* from = reinterpret_cast<const float*>(&v);
  if (count >= kHalf) {  // not a call for so few bytes
    std::memcpy(to, from, size_t(kHalf) * sizeof(float));
    to += kHalf;
    from += kHalf;
    count -= kHalf;
  }
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// Orders non-temporal stores before whatever tells another thread that they are done.
SENET_INLINE void finish_streams() {
#ifdef SENET_X86
  _mm_sfence();
#endif
}

// Tells the processor that a thread is waiting, and after a while the operating system.
SENET_INLINE void wait_a_little(int64_t turns) {
  constexpr int64_t kPatience = 4096;
  if (turns >= kPatience) {
    std::this_thread::yield();
    return;
  }
#ifdef SENET_X86
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Counters that threads share: take a number, look which is next, say that something is done and has
// been written, see that it is and read what was written.
SENET_INLINE int64_t take_number(int64_t& counter) {
  return __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED);
}
SENET_INLINE int64_t peek(const int64_t& counter) {
  return __atomic_load_n(&counter, __ATOMIC_RELAXED);
}
SENET_INLINE void publish(int64_t& counter, int64_t value) {
  __atomic_store_n(&counter, value, __ATOMIC_RELEASE);
}
SENET_INLINE int64_t see(const int64_t& counter) {
  return __atomic_load_n(&counter, __ATOMIC_ACQUIRE);
}

}  // namespace
}  // namespace senet
