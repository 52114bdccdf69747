// Whether this build's kernels can run on a machine: rules apart from the calls that ask for what
// they are about. Throw std::runtime_error("cuda: what must be there (got ...)").
#pragma once
#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <string>

#include "core/error.h"

namespace kn::cuda {

// Versions of CUDA as it numbers them, 13020 for 13.2; 0: there is no driver. A driver runs what
// was built with any version of its generation.
inline void check_driver(int driver, int runtime) {
  if (driver == 0) throw std::runtime_error("cuda: no NVIDIA driver was found");
  if (driver / 1000 < runtime / 1000)
    throw std::runtime_error(concat("cuda: the driver must be for CUDA ", runtime / 1000,
                                    ".0 or later (got ", driver / 1000, ".", driver % 1000 / 10,
                                    ")"));
}

// `architectures`: those of the build, "80 90a 120". Code runs on GPUs of its generation that are
// not older, what is compiled for an "a" on no other; the first is there as PTX too, which later
// generations compile.
inline bool has_code_for(int major, int minor, const std::string& architectures) {
  std::istringstream words(architectures);
  std::string word;
  for (bool first = true; words >> word; first = false) {
    const int number = std::atoi(word.c_str()), device = major * 10 + minor;
    const bool alone = word.back() == 'a';
    if (alone ? number == device : number <= device && (first || number / 10 == major)) return true;
  }
  return false;
}

inline void check_architecture(const std::string& name, int major, int minor,
                               const std::string& architectures) {
  if (major < 8 || !has_code_for(major, minor, architectures))
    throw std::runtime_error(
        concat("cuda: ", name, " must have a compute capability of 8.0 or more",
               " that this build is for, ", architectures, " (got ", major, ".", minor, ")"));
}

}  // namespace kn::cuda
