#include "options.h"

#include <cstdlib>
#include <sstream>

namespace kn::bench {
namespace {

double number(const std::string& option, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end || !(value > 0))
    throw UsageError{option + ": must be positive numbers (got " + text + ")"};
  return value;
}

template <typename T>
std::vector<T> counts(const std::string& option, const std::string& text) {
  std::vector<T> values;
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) {
    const double value = number(option, part);
    if (value != double(int64_t(value)) || value > 1 << 20)
      throw UsageError{option + ": must be counts of at most 1048576 (got " + part + ")"};
    values.push_back(T(value));
  }
  if (values.empty()) throw UsageError{option + ": must name at least one (got none)"};
  return values;
}

void parse_option(Options& options, const std::string& name, const std::string& value) {
  if (name == "--threads")
    options.threads = counts<int>(name, value);
  else if (name == "--tokens")
    options.tokens = counts<int64_t>(name, value);
  else if (name == "--shape")
    options.shape = value;
  else if (name == "--time-budget")
    options.budget_s = number(name, value);
  else if (name == "--pages" && (value == "4k" || value == "2m"))
    options.pages = value == "4k" ? Pages::k4KiB : Pages::k2MiB;
  else if (name == "--pages")
    throw UsageError{"--pages: must be 4k or 2m (got " + value + ")"};
  else if (name == "--compute" && (value == "exact" || value == "int8"))
    options.compute = value == "exact" ? Compute::kExact : Compute::kInt8;
  else if (name == "--compute")
    throw UsageError{"--compute: must be exact or int8 (got " + value + ")"};
  else
    throw UsageError{name + ": unknown option"};
}

}  // namespace

Options parse_options(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--quick") {
      options.quick = true;
      options.budget_s = 0.1;
    } else if (argument == "--json") {
      options.json = true;
    } else if (argument.rfind("--", 0) != 0) {
      options.programs.push_back(argument);
    } else if (++i < argc) {
      parse_option(options, argument, argv[i]);
    } else {
      throw UsageError{argument + ": a value must follow, or the option is unknown"};
    }
  }
  return options;
}

std::string usage(const std::vector<std::string>& programs) {
  std::string text =
      "usage: kn_bench [PROGRAM ...] [--threads N,...] [--tokens N,...] [--shape TEXT]\n"
      "                [--time-budget SECONDS] [--quick] [--pages 4k|2m] [--compute exact|int8]\n"
      "                [--json]\n"
      "Programs:";
  for (const std::string& name : programs) text += " " + name;
  return text +
         "\n(default: all but limits). --shape keeps the shapes whose text contains TEXT.\n"
         "--compute is of the INT4 ops. --time-budget is for one case. KIMI_NATIVE_CPU_ISA forces "
         "a kernel tier.\n";
}

}  // namespace kn::bench
