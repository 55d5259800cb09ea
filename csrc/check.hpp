// check.hpp: wrong arguments become Python exceptions that show the actual values.
#pragma once

#include <pybind11/pybind11.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace bonsai_fast {

template <typename... Parts>
std::string concatenate(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

}  // namespace bonsai_fast

#define BONSAI_FAST_CHECK(exception, condition, ...)                            \
  do {                                                                          \
    if (!(condition)) throw exception(::bonsai_fast::concatenate(__VA_ARGS__)); \
  } while (false)

// ValueError, TypeError and IndexError on the Python side.
#define CHECK(condition, ...) BONSAI_FAST_CHECK(std::invalid_argument, condition, __VA_ARGS__)
#define CHECK_TYPE(condition, ...) BONSAI_FAST_CHECK(pybind11::type_error, condition, __VA_ARGS__)
#define CHECK_INDEX(condition, ...) BONSAI_FAST_CHECK(pybind11::index_error, condition, __VA_ARGS__)
