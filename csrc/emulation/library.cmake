# The CUDA kernels, compiled as C++, in place of those of the CPU. Rewritten are their launch, which is in one place and
# which a C++ compiler cannot read, and from how many points on knn builds a tree, as so many take minutes here.
function(rewrite file from to)
  file(READ ${CMAKE_CURRENT_SOURCE_DIR}/${file} written)
  string(REGEX REPLACE "${from}" "${to}" rewritten "${written}")
  if(rewritten STREQUAL written)
    message(FATAL_ERROR "${file}: expected ${from}")
  endif()
  file(GENERATE OUTPUT ${CMAKE_BINARY_DIR}/rewritten/${file} CONTENT "${rewritten}")
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${file})
endfunction()
rewrite(common/cuda_utils.cuh "kernel<<<([^,]+), threads, [^;]*>>>\\(arguments\\.\\.\\.\\);"
  "emulation::launch([&] { kernel(arguments...); }, \\1, threads);")
rewrite(knn/cuda.cu "kTreePoints = 32768" "kTreePoints = 3072")

list(TRANSFORM cuda_sources REPLACE "^knn/" "${CMAKE_BINARY_DIR}/rewritten/knn/")
set_source_files_properties(${cuda_sources} PROPERTIES LANGUAGE CXX)
paper_layers_library(_cpu ${CMAKE_CURRENT_LIST_DIR}/scheduler.cpp ${cuda_sources})
target_include_directories(_cpu BEFORE PRIVATE ${CMAKE_BINARY_DIR}/rewritten ${CMAKE_CURRENT_LIST_DIR})
target_compile_definitions(_cpu PRIVATE USE_CUDA)
target_compile_options(_cpu PRIVATE -O1 -g1 -fdata-sections -Wno-unknown-pragmas)
# What is static in functions of ours is shared memory. (GCC 12 ignores a section that is named in a template.)
file(WRITE ${CMAKE_BINARY_DIR}/shared.ld [[
SECTIONS {
  cuda_shared (NOLOAD) : {
    . = ALIGN(8);
    HIDDEN(cuda_shared_begin = .);
    *(.bss._ZZN12paper_layers*)
    . = ALIGN(8);
    HIDDEN(cuda_shared_end = .);
  }
}
INSERT AFTER .bss;
]])
# With PAPER_LAYERS_SANITIZE: AddressSanitizer does not know the stacks of fibers.
if(PAPER_LAYERS_SANITIZE)
  target_compile_options(_cpu PRIVATE --param=asan-stack=0)
  set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/scheduler.cpp PROPERTIES COMPILE_OPTIONS -fno-sanitize=all)
endif()
target_link_options(_cpu PRIVATE -Wl,-T,${CMAKE_BINARY_DIR}/shared.ld)
