// Calls of the other sources' functions, one after the other, as a table lists them, by one team of
// threads. A decode step of a small model makes some 270 of them, and from Python each costs several
// microseconds, in which the other threads wait.

#include <cstdint>

#include "cpu_team.h"

namespace {

// As `CallTable` in cpu_calls.py lays it out. `number` stands where the function has a float.
struct Call {
  int64_t kind;
  void* function;
  int64_t args[18];
  double number;
};

enum Kind : int64_t { ADD_RMS_NORM, SILU_AND_MUL, ROTATE_AND_CACHE, DECODE_ATTENTION, PACKED_LINEAR };

using P = void*;
using N = int64_t;
using F = float;
using I = int;
using M = Member*;

void run(const Call& call, Member* m) {
  const int64_t* a = call.args;
  auto p = [a](int i) { return (void*)a[i]; };
  auto f = [a](int i) { return (int)a[i]; };
  const float x = (float)call.number;
  switch (call.kind) {
    case ADD_RMS_NORM:
      ((void (*)(P, P, P, P, P, N, N, F, I, M))call.function)(  //
          p(0), p(1), p(2), p(3), p(4), a[5], a[6], x, f(7), m);
      break;
    case SILU_AND_MUL:
      ((void (*)(P, P, N, N, I, M))call.function)(p(0), p(1), a[2], a[3], f(4), m);
      break;
    case ROTATE_AND_CACHE:
      ((void (*)(P, P, P, P, P, P, N, N, N, N, P, P, F, I, M))call.function)(  //
          p(0), p(1), p(2), p(3), p(4), p(5), a[6], a[7], a[8], a[9], p(10), p(11), x, f(12), m);
      break;
    case DECODE_ATTENTION:
      ((void (*)(P, N, P, P, P, N, P, N, N, N, N, N, F, N, P, P, I, M))call.function)(  //
          p(0), a[1], p(2), p(3), p(4), a[5], p(6), a[7], a[8], a[9], a[10], a[11], x, a[12],
          p(13), p(14), f(15), m);
      break;
    case PACKED_LINEAR:
      ((void (*)(P, P, P, P, P, P, P, N, N, N, I, I, I, I, I, I, I, I, M))call.function)(  //
          p(0), p(1), p(2), p(3), p(4), p(5), p(6), a[7], a[8], a[9], f(10), f(11), f(12), f(13),
          f(14), f(15), f(16), f(17), m);
      break;
  }
}

}  // namespace

extern "C" void run_calls(const Call* calls, int64_t count, int threads) {
  Team team;
#pragma omp parallel num_threads(threads)
  {
    Member member(team);
    for (int64_t i = 0; i < count; ++i) run(calls[i], &member);
  }
}
