# ggml's base library once more, as a shared one: for models that are quantized while they are
# converted. The programs keep it inside.

set(CMAKE_FIND_PACKAGE_TARGETS_GLOBAL ON) # what it is linked with is known everywhere

function(add_quantizer)
  get_target_property(folder ggml-base SOURCE_DIR)
  get_target_property(sources ggml-base SOURCES)
  get_target_property(libraries ggml-base LINK_LIBRARIES)
  list(FILTER sources INCLUDE REGEX "\\.(c|cpp)$")
  list(TRANSFORM sources PREPEND "${folder}/")
  add_library(ggml-quantizer SHARED ${sources})
  target_compile_features(ggml-quantizer PRIVATE c_std_11 cxx_std_17)
  target_include_directories(
    ggml-quantizer PRIVATE $<TARGET_PROPERTY:ggml-base,INCLUDE_DIRECTORIES>)
  target_compile_definitions(
    ggml-quantizer PRIVATE $<TARGET_PROPERTY:ggml-base,COMPILE_DEFINITIONS>)
  target_compile_options(ggml-quantizer PRIVATE $<TARGET_PROPERTY:ggml-base,COMPILE_OPTIONS>)
  target_link_libraries(ggml-quantizer PRIVATE ${libraries})
  set_target_properties(
    ggml-quantizer PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
endfunction()

# Once all targets are there.
cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL add_quantizer)
