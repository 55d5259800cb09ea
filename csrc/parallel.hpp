// parallel.hpp: split [0, count) into contiguous ranges, one thread each.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace bonsai_fast {

// How many threads are worth starting: each must touch at least `kBytesPerThread`.
inline int64_t useful_threads(int64_t num_threads, int64_t total_bytes) {
  constexpr int64_t kBytesPerThread = int64_t{1} << 18;
  return std::clamp<int64_t>(total_bytes / kBytesPerThread, 1, num_threads);
}

// Calls body(begin, end) on disjoint ranges that cover [0, count). `grain` keeps every boundary but
// the last on a multiple of it. `body` must not throw.
template <typename Body>
void parallel_for(int64_t count, int64_t num_threads, int64_t grain, const Body& body) {
  const int64_t grains = (count + grain - 1) / grain;
  const int64_t parts = std::clamp<int64_t>(num_threads, 1, std::max<int64_t>(grains, 1));
  const auto boundary = [&](int64_t part) {
    return std::min(count, grains * part / parts * grain);
  };

  struct Joiner {
    std::vector<std::thread> threads;
    ~Joiner() {
      for (std::thread& thread : threads) thread.join();
    }
  } workers;
  workers.threads.reserve(static_cast<size_t>(parts - 1));
  // The calling thread takes the last part.
  for (int64_t part = 0; part + 1 < parts; ++part)
    workers.threads.emplace_back(body, boundary(part), boundary(part + 1));
  body(boundary(parts - 1), count);
}

}  // namespace bonsai_fast
