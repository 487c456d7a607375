# Outside libraries, all from distribution packages; nothing is downloaded. Each has one door in the house
# (docs/ARCHITECTURE.md); tools/check_layering.py holds it.
find_package(PkgConfig REQUIRED)
find_package(Threads REQUIRED)
find_package(OpenSSL REQUIRED COMPONENTS Crypto)          # libkvshare/core/hash.cc
find_package(absl REQUIRED)                               # .cc files only: flat_hash_map, StrFormat
find_package(FlatBuffers CONFIG REQUIRED)                 # protocol, libkvshare/codec
find_package(cppzmq REQUIRED)                             # libkvshare/client, agentd/server
find_package(nlohmann_json REQUIRED)                      # runtime, tools
find_package(CLI11 REQUIRED)                              # tools, agentd/main.cc
# kernels/cpu/linear.cc. By header and library: Debian 12's dnnl-config.cmake asks for OpenCL's development files, which
# the CPU's part does not need.
find_path(DNNL_INCLUDE_DIR oneapi/dnnl/dnnl.hpp REQUIRED)
find_library(DNNL_LIBRARY dnnl REQUIRED)
add_library(kvs_dnnl INTERFACE)
target_include_directories(kvs_dnnl SYSTEM INTERFACE ${DNNL_INCLUDE_DIR})
target_link_libraries(kvs_dnnl INTERFACE ${DNNL_LIBRARY})
# agentd/tiers/*.cc. By header and library: Debian 12 has no CMake or pkg-config file for the shared RocksDB alone.
# xxHash is used by its header only.
find_path(ROCKSDB_INCLUDE_DIR rocksdb/db.h REQUIRED)
find_library(ROCKSDB_LIBRARY rocksdb REQUIRED)
find_path(XXHASH_INCLUDE_DIR xxhash.h REQUIRED)
add_library(kvs_rocksdb INTERFACE)
target_include_directories(kvs_rocksdb SYSTEM INTERFACE ${ROCKSDB_INCLUDE_DIR} ${XXHASH_INCLUDE_DIR})
target_link_libraries(kvs_rocksdb INTERFACE ${ROCKSDB_LIBRARY})
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)  # runtime/pre_tokenizer.cc
pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)  # runtime/unicode.cc
pkg_check_modules(YAML REQUIRED IMPORTED_TARGET yaml-0.1)  # agentd/config/yaml_reader.cc
pkg_check_modules(ZLIB REQUIRED IMPORTED_TARGET zlib)     # tools: .gz traces
if(KVS_TESTS)
  find_package(GTest REQUIRED)
endif()
if(KVS_BENCH)
  find_package(benchmark REQUIRED)
endif()
