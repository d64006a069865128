// Compiles what lies between AIRL_FAST_BEGIN_TARGET("avx2,fma") and AIRL_FAST_END_TARGET for these
// instructions, whatever the compiler's flags. Standard headers come before: their inline functions
// must stay code that runs anywhere.
#pragma once

#define AIRL_FAST_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define AIRL_FAST_BEGIN_TARGET(names) \
  AIRL_FAST_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define AIRL_FAST_END_TARGET _Pragma("clang attribute pop")
#elif defined(__GNUC__)
#define AIRL_FAST_BEGIN_TARGET(names) \
  _Pragma("GCC push_options") AIRL_FAST_PRAGMA(GCC target(names))
#define AIRL_FAST_END_TARGET _Pragma("GCC pop_options")
#else  // MSVC takes every intrinsic everywhere
#define AIRL_FAST_BEGIN_TARGET(names)
#define AIRL_FAST_END_TARGET
#endif

#if defined(__x86_64__) || defined(_M_X64)
#define AIRL_FAST_X86 1
#else
#define AIRL_FAST_X86 0
#endif
