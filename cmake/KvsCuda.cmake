# The CUDA toolkit, for kernels/cuda alone. KVS_CUDA: AUTO builds the plug-in where the toolkit is, ON fails where it is
# not, OFF never looks. Sets KVS_CUDA_BUILT (TRUE or FALSE) and, where it is FALSE, KVS_CUDA_SKIPPED_BECAUSE.
# nvcc is called by a rule of ours rather than as a language of CMake's, because the compiler's report has to be kept: a
# test reads it (tests/kernels/cuda/spills_test.py).
set(KVS_CUDA AUTO CACHE STRING "The CUDA backend: AUTO (where the toolkit is), ON or OFF")
set_property(CACHE KVS_CUDA PROPERTY STRINGS AUTO ON OFF)
# From the oldest that has what the kernels use to the newest; the last also as PTX, for those to come. What this nvcc
# does not know is left out.
set(KVS_CUDA_ARCHITECTURES 80 90a 100 CACHE STRING "GPU architectures of the CUDA backend")
set(KVS_CUDA_BUILT FALSE)

if(KVS_CUDA STREQUAL "OFF")
  set(KVS_CUDA_SKIPPED_BECAUSE "it was built with -DKVS_CUDA=OFF")
else()
  find_program(KVS_NVCC nvcc HINTS ENV CUDA_PATH ENV CUDA_HOME PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(KVS_NVCC)
    get_filename_component(kvs_cuda_bin ${KVS_NVCC} REALPATH)
    get_filename_component(kvs_cuda_bin ${kvs_cuda_bin} DIRECTORY)
    set(kvs_cuda_hints ${kvs_cuda_bin}/.. /usr/local/cuda)
    find_path(KVS_CUDA_INCLUDE cublasLt.h HINTS ${kvs_cuda_hints} PATH_SUFFIXES include targets/x86_64-linux/include)
    foreach(library cudart_static cublasLt)
      find_library(KVS_CUDA_${library} ${library} HINTS ${kvs_cuda_hints}
        PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib)
    endforeach()
    execute_process(COMMAND ${KVS_NVCC} --list-gpu-code OUTPUT_VARIABLE kvs_cuda_known ERROR_QUIET)
    execute_process(COMMAND ${KVS_NVCC} --version OUTPUT_VARIABLE kvs_cuda_release ERROR_QUIET)
    string(REGEX MATCH "release ([0-9.]+)" kvs_cuda_release "${kvs_cuda_release}")
    set(KVS_CUDA_RELEASE "${CMAKE_MATCH_1}")
  endif()
  set(kvs_cuda_codes)
  foreach(architecture ${KVS_CUDA_ARCHITECTURES})
    string(REGEX REPLACE "[a-z]" "" number ${architecture})  # nvcc lists 90 and knows 90a with it
    if("${kvs_cuda_known}" MATCHES "sm_${number}[^0-9a-z]")
      list(APPEND kvs_cuda_codes ${architecture})
    endif()
  endforeach()
  if(NOT KVS_NVCC)
    set(KVS_CUDA_SKIPPED_BECAUSE "nvcc was not found when it was built")
  elseif(NOT KVS_CUDA_INCLUDE OR NOT KVS_CUDA_cublasLt)
    set(KVS_CUDA_SKIPPED_BECAUSE "cuBLASLt was not found when it was built")
  elseif(NOT KVS_CUDA_cudart_static)
    set(KVS_CUDA_SKIPPED_BECAUSE "the static CUDA runtime was not found when it was built")
  elseif(NOT kvs_cuda_codes)
    set(KVS_CUDA_SKIPPED_BECAUSE "its nvcc knows none of the architectures ${KVS_CUDA_ARCHITECTURES}")
  elseif(KVS_SANITIZE OR KVS_FUZZ)
    set(KVS_CUDA_SKIPPED_BECAUSE "it was built with a sanitizer, which the CUDA driver does not bear")
  else()
    set(KVS_CUDA_BUILT TRUE)
  endif()
endif()

if(KVS_CUDA_BUILT)
  list(JOIN kvs_cuda_codes " sm_" kvs_cuda_text)
  set(KVS_CUDA_BUILD "CUDA ${KVS_CUDA_RELEASE} for sm_${kvs_cuda_text}")
  message(STATUS "CUDA backend: ${KVS_CUDA_BUILD}")
elseif(KVS_CUDA STREQUAL "ON")
  message(FATAL_ERROR "CUDA backend: asked for with KVS_CUDA=ON, but ${KVS_CUDA_SKIPPED_BECAUSE}")
else()
  message(STATUS "CUDA backend: skipped, because ${KVS_CUDA_SKIPPED_BECAUSE}")
endif()

# kvs_cuda_object(OUT file.cu): compiles it for every architecture; OUT becomes the object, OUT_REPORT what ptxas said.
function(kvs_cuda_object out source)
  set(object ${CMAKE_CURRENT_BINARY_DIR}/${source}.o)
  set(report ${CMAKE_CURRENT_BINARY_DIR}/${source}.ptxas.txt)
  set(codes)
  foreach(architecture ${kvs_cuda_codes})
    list(APPEND codes -gencode arch=compute_${architecture},code=sm_${architecture})
  endforeach()
  list(GET kvs_cuda_codes -1 newest)
  list(APPEND codes -gencode arch=compute_${newest},code=compute_${newest})
  # -fmad=false: where a fused multiply-add is meant, it is written, as on the CPU.
  set(command ${KVS_NVCC} -std=c++20 -O3 -fmad=false -ccbin ${CMAKE_CXX_COMPILER} --threads 2 ${codes}
    -Xptxas=-v -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror
    -I${PROJECT_SOURCE_DIR} -I${PROJECT_SOURCE_DIR}/libkvshare/include
    -MD -MF ${object}.d -c ${CMAKE_CURRENT_SOURCE_DIR}/${source} -o ${object})
  list(JOIN command " " line)
  add_custom_command(OUTPUT ${object} ${report}
    COMMAND sh -c "${line} 2> ${report} || { cat ${report} >&2; exit 1; }"
    DEPENDS ${source} DEPFILE ${object}.d COMMENT "nvcc ${source}" VERBATIM)
  set(${out} ${object} PARENT_SCOPE)
  set(${out}_REPORT ${report} PARENT_SCOPE)
endfunction()
