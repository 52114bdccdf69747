# The CUDA kernels: a shared library of their own beside the extension, so that the package is the same without them.
#
#   KN_CUDA        AUTO: if nvcc is found; ON: or fail; OFF
#   KN_CUDA_ARCHS  what to compile for; the first also as PTX, for GPUs that come later. Sources named *_sm90.cu are
#                  compiled for 90a and nothing else, whatever the list says: the rest of an op asks for them by name, and
#                  uses them on Hopper alone
#   KN_CUDA_BENCH  kn_cuda_bench, which times the kernels (bench/cuda); not installed

set(KN_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO (if nvcc is found), ON or OFF")
set_property(CACHE KN_CUDA PROPERTY STRINGS AUTO ON OFF)
# GPUs of 8.6 and 8.9 run the code for 8.0; each further copy would be half a megabyte of a wheel.
set(KN_CUDA_ARCHS "80;90a;120" CACHE STRING "Architectures to compile the CUDA kernels for")
option(KN_CUDA_BENCH "Build the benchmark program of the CUDA kernels" OFF)

if(NOT KN_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "KN_CUDA must be AUTO, ON or OFF (got ${KN_CUDA})")
endif()
if(KN_CUDA STREQUAL "OFF")
  return()
endif()

find_program(KN_NVCC nvcc HINTS $ENV{CUDACXX} $ENV{CUDA_HOME}/bin /usr/local/cuda/bin)
if(NOT KN_NVCC)
  if(KN_CUDA STREQUAL "ON")
    message(FATAL_ERROR "KN_CUDA=ON needs nvcc, which was not found (put it on PATH or set CUDA_HOME)")
  endif()
  return()
endif()

# nvcc is called directly: what a host compiler check of CMake's own CUDA support costs is more than the kernels do.
set(gencode)
foreach(arch IN LISTS KN_CUDA_ARCHS)
  list(APPEND gencode -gencode arch=compute_${arch},code=sm_${arch})
endforeach()
list(GET KN_CUDA_ARCHS 0 oldest)
list(APPEND gencode -gencode arch=compute_${oldest},code=compute_${oldest})
set(hopper -gencode arch=compute_90a,code=sm_90a)
string(REPLACE ";" " " architectures "${KN_CUDA_ARCHS}")

# Products and sums are fused where the source says so, as in every other object of the project.
set(KN_NVCC_FLAGS -std=c++20 -O3 -fmad=false --expt-relaxed-constexpr --threads 2 -cudart static
    -Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall "-DKN_CUDA_ARCHITECTURES=\"${architectures}\""
    -I${PROJECT_SOURCE_DIR}/csrc -I${PROJECT_SOURCE_DIR}/csrc/include)

# kn_cuda_objects(OBJECTS sources...): the objects of CUDA sources, or of C++ ones that call the runtime.
function(kn_cuda_objects result)
  set(objects)
  foreach(source IN LISTS ARGN)
    file(RELATIVE_PATH path ${PROJECT_SOURCE_DIR} ${source})
    string(REGEX REPLACE "^csrc/|\\.[a-z]+$" "" path ${path})
    set(object ${CMAKE_BINARY_DIR}/${path}.o)
    get_filename_component(folder ${object} DIRECTORY)
    set(architecture ${gencode})
    if(path MATCHES "_sm90$")
      set(architecture ${hopper})
    endif()
    add_custom_command(
      OUTPUT ${object}
      COMMAND ${CMAKE_COMMAND} -E make_directory ${folder}
      COMMAND ${KN_NVCC} ${KN_NVCC_FLAGS} ${architecture} -MD -MT ${object} -MF ${object}.d -c ${source} -o ${object}
      DEPENDS ${source}
      DEPFILE ${object}.d
      VERBATIM)
    list(APPEND objects ${object})
  endforeach()
  set(${result} ${objects} PARENT_SCOPE)
endfunction()

file(GLOB sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cuda/*.cu)
kn_cuda_objects(objects ${sources})
set(library ${CMAKE_BINARY_DIR}/libkn_cuda.so)
add_custom_command(
  OUTPUT ${library}
  COMMAND ${KN_NVCC} -shared -cudart static -Xlinker -s ${objects} -o ${library}
  DEPENDS ${objects}
  VERBATIM)
add_custom_target(kn_cuda ALL DEPENDS ${library})
install(FILES ${library} DESTINATION kimi_native)

# Linked with the kernels' objects: it calls the ops as C++ functions.
if(KN_CUDA_BENCH)
  file(GLOB sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/bench/cuda/*.c*)
  list(REMOVE_ITEM sources ${PROJECT_SOURCE_DIR}/bench/cuda/rehearsal.cpp)
  kn_cuda_objects(bench_objects ${sources} ${PROJECT_SOURCE_DIR}/bench/options.cpp)
  set(program ${CMAKE_BINARY_DIR}/bench/kn_cuda_bench)
  add_custom_command(
    OUTPUT ${program}
    COMMAND ${KN_NVCC} -cudart static ${bench_objects} ${objects} -o ${program} -ldl
    DEPENDS ${bench_objects} ${objects}
    VERBATIM)
  add_custom_target(kn_cuda_bench ALL DEPENDS ${program})
  add_dependencies(kn_cuda_bench kn_cuda)  # or both would make the objects, at the same time
endif()
