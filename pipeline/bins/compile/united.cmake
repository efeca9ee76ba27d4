# Source files that are compiled together, some at a time: most of what each costs is the same
# headers. For the pinned tree alone, whose files are known; ggml and libllama stay as they are.

function(unite)
  # These include what must not be seen by others.
  file(GLOB helpers "${CMAKE_SOURCE_DIR}/tools/mtmd/mtmd-helper*.cpp")
  set_source_files_properties(
    ${helpers} TARGET_DIRECTORY mtmd PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
  set_source_files_properties(
    "${CMAKE_SOURCE_DIR}/common/json.cpp" TARGET_DIRECTORY llama-common
    PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
  set_target_properties(llama-common mtmd PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 8)
  set_target_properties(
    server-context llama-server-impl PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 4)
endfunction()

# Once all targets are there.
cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL unite)
