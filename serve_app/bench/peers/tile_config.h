/* Included before every C++ file when llama.cpp is built here with GCC.
 *
 * GCC's _tile_loadconfig names 8 of the 64 bytes that LDTILECFG reads as its operand (seen in
 * GCC 12), so the compiler drops or moves the stores to the others, and the instruction faults on
 * a processor with AMX. This one names all of them.
 */
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) \
    __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(config)))
#endif
