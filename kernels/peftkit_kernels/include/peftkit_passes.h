// Includes PEFTKIT_FILE, the file that includes this one as seen from here, once for each kind of processor: with PEFTKIT_PASS (512, 256 or
// 0), PEFTKIT_TARGET, PEFTKIT_INLINE and PEFTKIT_NAME, the namespace of the pass, defined. PEFTKIT_RUN calls a function of
// the pass for the widest vectors that this processor has.
#pragma once

#define PEFTKIT_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__)

#define PEFTKIT_PASS 512
#define PEFTKIT_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")))
#define PEFTKIT_NAME wide512
#include PEFTKIT_FILE
#undef PEFTKIT_PASS
#undef PEFTKIT_TARGET
#undef PEFTKIT_NAME
#define PEFTKIT_PASS 256
#define PEFTKIT_TARGET __attribute__((target("avx2,fma,f16c")))
#define PEFTKIT_NAME wide256
#include PEFTKIT_FILE
#undef PEFTKIT_PASS
#undef PEFTKIT_TARGET
#undef PEFTKIT_NAME

#define PEFTKIT_RUN(...)                       \
  (peftkit::cpu().avx512 ? wide512::__VA_ARGS__ \
   : peftkit::cpu().avx2 ? wide256::__VA_ARGS__ \
                         : portable::__VA_ARGS__)

#else

#define PEFTKIT_RUN(...) portable::__VA_ARGS__

#endif

#define PEFTKIT_PASS 0
#define PEFTKIT_TARGET
#define PEFTKIT_NAME portable
#include PEFTKIT_FILE
#undef PEFTKIT_PASS
#undef PEFTKIT_TARGET
#undef PEFTKIT_NAME
