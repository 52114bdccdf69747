# The CUDA kernels: a shared library of their own beside the extension, so that the package is the same without them.
#
#   KN_CUDA        AUTO: if nvcc is found; ON: or fail; OFF
#   KN_CUDA_ARCHS  what to compile for; the first also as PTX, for GPUs that come later. Sources named *_sm90.cu are
#                  compiled for 90a and nothing else, whatever the list says: the rest of an op asks for them by name, and
#                  uses them on Hopper alone

set(KN_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO (if nvcc is found), ON or OFF")
set_property(CACHE KN_CUDA PROPERTY STRINGS AUTO ON OFF)
set(KN_CUDA_ARCHS "80;86;89;90a;120" CACHE STRING "Architectures to compile the CUDA kernels for")

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

file(GLOB sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cuda/*.cu)
set(objects)
foreach(source IN LISTS sources)
  get_filename_component(name ${source} NAME_WE)
  set(object ${CMAKE_BINARY_DIR}/cuda/${name}.o)
  set(architecture ${gencode})
  if(name MATCHES "_sm90$")
    set(architecture ${hopper})
  endif()
  add_custom_command(
    OUTPUT ${object}
    COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_BINARY_DIR}/cuda
    COMMAND ${KN_NVCC} ${KN_NVCC_FLAGS} ${architecture} -MD -MT ${object} -MF ${object}.d -c ${source} -o ${object}
    DEPENDS ${source}
    DEPFILE ${object}.d
    VERBATIM)
  list(APPEND objects ${object})
endforeach()
set(library ${CMAKE_BINARY_DIR}/libkn_cuda.so)
add_custom_command(
  OUTPUT ${library}
  COMMAND ${KN_NVCC} -shared -cudart static -Xlinker -s ${objects} -o ${library}
  DEPENDS ${objects}
  VERBATIM)
add_custom_target(kn_cuda ALL DEPENDS ${library})
install(FILES ${library} DESTINATION kimi_native)
