# Flags that every target shares, and the per-instruction-set objects.

function(kn_defaults target)
  target_include_directories(${target} PUBLIC ${PROJECT_SOURCE_DIR}/csrc/include PRIVATE ${PROJECT_SOURCE_DIR}/csrc)
  # No contraction: a product and a sum are fused where the source says so, in every tier alike.
  target_compile_options(${target} PRIVATE -Wall -Wextra -ffp-contract=off)
  if(KN_WERROR)
    target_compile_options(${target} PRIVATE -Werror)
  endif()
  if(KN_SANITIZE)
    target_compile_options(${target} PRIVATE -fsanitize=${KN_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g)
    target_link_options(${target} PUBLIC -fsanitize=${KN_SANITIZE})
  endif()
endfunction()

# kn_add_isa(NAME SOURCE flags...): a source of csrc/cpu compiled for some processors only and added to kn_core. A weak
# symbol in such an object could replace another one's copy at link time and hand it to an older processor, so one fails
# the build.
function(kn_add_isa name source)
  add_library(kn_${name} OBJECT csrc/cpu/${source})
  kn_defaults(kn_${name})
  # GCC 12's own AVX-512 headers trip its uninitialized-use warnings.
  # With sanitizers -O1: checks around every array element of the generic tier take -O3 many minutes to compile.
  set(level -O3)
  if(KN_SANITIZE)
    set(level -O1)
  endif()
  target_compile_options(kn_${name} PRIVATE ${level} -fno-exceptions -fno-rtti -fno-math-errno -Wno-uninitialized
                                            -Wno-maybe-uninitialized ${ARGN})
  target_compile_definitions(kn_${name} PRIVATE KN_ISA=${name})
  if(NOT KN_SANITIZE)
    add_custom_command(
      OUTPUT ${CMAKE_BINARY_DIR}/${name}.no_weak_symbols
      COMMAND ${CMAKE_COMMAND} -DNM=${CMAKE_NM} "-DOBJECTS=$<TARGET_OBJECTS:kn_${name}>"
              -P ${PROJECT_SOURCE_DIR}/cmake/no_weak_symbols.cmake
      COMMAND ${CMAKE_COMMAND} -E touch ${CMAKE_BINARY_DIR}/${name}.no_weak_symbols
      DEPENDS kn_${name} $<TARGET_OBJECTS:kn_${name}>
      VERBATIM)
    add_custom_target(kn_${name}_symbols ALL DEPENDS ${CMAKE_BINARY_DIR}/${name}.no_weak_symbols)
    add_dependencies(kn_core kn_${name}_symbols)
  endif()
  target_sources(kn_core PRIVATE $<TARGET_OBJECTS:kn_${name}>)
  string(TOUPPER ${name} upper)
  target_compile_definitions(kn_core PRIVATE KN_HAVE_${upper})
endfunction()
