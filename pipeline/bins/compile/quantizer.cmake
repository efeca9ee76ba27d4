# ggml's base library once more, as a shared one: for models that are quantized while they are
# converted. The programs keep it inside. On x86-64 some types take several blocks at a time, with
# quantizer.h. For the pinned tree alone, whose text is known.

set(CMAKE_FIND_PACKAGE_TARGETS_GLOBAL ON) # what it is linked with is known everywhere

# Write FILE with what the calls of the functions that take most of the time become.
function(write_quants original file)
  file(READ "${original}" text)
  set(bound "#define GROUP_MAX_EPS 1e-15f")
  string(REPLACE "${bound}\n" "${bound}\n#include \"quantizer.h\"\n" text "${text}")
  # The loop that follows needs the results of all blocks from its first turn on ...
  string(REGEX REPLACE
    "scales.j. = make_qkx2_quants.32, 15,[^;]*;"
    "if (j == 0) lanes_qkx(x, NULL, 15, L, scales, mins, -1.f, 0.1f, 20);"
    text "${text}")
  string(REGEX REPLACE
    "scales.j. = make_qkx2_quants.32, 31,[^;]*;"
    "if (j == 0) lanes_qkx(x, NULL, 31, L, scales, mins, -0.5f, 0.1f, 15);"
    text "${text}")
  # ... or, with an importance matrix, after its last, when the weights of all are there.
  foreach(most IN ITEMS 15 31)
    string(REGEX REPLACE
      "scales.j. = make_qkx3_quants.32, ${most},[^;]*;"
      "static __thread float all[QK_K];
            memcpy(all + 32*j, weights, sizeof(weights));
            if (j == QK_K/32 - 1) lanes_qkx(x, all, ${most}, L, scales, mins, -0.9f, 0.05f, 36);"
      text "${text}")
  endforeach()
  string(REGEX REPLACE
    "const float scale = make_qx_quants.16, 32,[^;]*NULL.;"
    "if (ib % 8 == 0) lanes_qx(x + 16*ib, NULL, 32, L + 16*ib, scales + ib, GROUP_MAX_EPS);
            const float scale = scales[ib];"
    text "${text}")
  string(REGEX REPLACE
    " scale = make_qx_quants.16, 32,[^;]*qw.;"
    " if (ib % 8 == 0) lanes_qx(x + 16*ib, qw, 32, L + 16*ib, scales + ib, GROUP_MAX_EPS);
                scale = scales[ib];"
    text "${text}")
  if(EXISTS "${file}")
    file(READ "${file}" before)
  endif()
  if(NOT "${text}" STREQUAL "${before}")
    file(WRITE "${file}" "${text}")
  endif()
endfunction()

function(add_quantizer)
  get_target_property(folder ggml-base SOURCE_DIR)
  get_target_property(sources ggml-base SOURCES)
  get_target_property(libraries ggml-base LINK_LIBRARIES)
  list(FILTER sources INCLUDE REGEX "\\.(c|cpp)$")
  list(TRANSFORM sources PREPEND "${folder}/")
  execute_process(
    COMMAND ${CMAKE_C_COMPILER} -march=native -dM -E -x c /dev/null
    OUTPUT_VARIABLE macros ERROR_QUIET)
  if("${macros}" MATCHES "__AVX2__")
    set(quants "${CMAKE_BINARY_DIR}/quantizer/ggml-quants.c")
    write_quants("${folder}/ggml-quants.c" "${quants}")
    list(REMOVE_ITEM sources "${folder}/ggml-quants.c")
    list(APPEND sources "${quants}")
    # The programs have no fused operations, which round otherwise.
    set_source_files_properties(
      "${quants}" PROPERTIES COMPILE_OPTIONS "-mavx2;-ffp-contract=off;-fno-math-errno")
  endif()
  add_library(ggml-quantizer SHARED ${sources})
  target_compile_features(ggml-quantizer PRIVATE c_std_11 cxx_std_17)
  target_include_directories(
    ggml-quantizer PRIVATE
    $<TARGET_PROPERTY:ggml-base,INCLUDE_DIRECTORIES> "${CMAKE_CURRENT_FUNCTION_LIST_DIR}")
  target_compile_definitions(
    ggml-quantizer PRIVATE $<TARGET_PROPERTY:ggml-base,COMPILE_DEFINITIONS>)
  target_compile_options(ggml-quantizer PRIVATE $<TARGET_PROPERTY:ggml-base,COMPILE_OPTIONS>)
  target_link_libraries(ggml-quantizer PRIVATE ${libraries})
  set_target_properties(
    ggml-quantizer PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
endfunction()

# Once all targets are there.
cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL add_quantizer)
