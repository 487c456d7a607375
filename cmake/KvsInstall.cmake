# What `cmake --install` puts where: libkvshare.so with its headers, for find_package(kvshare) and pkg-config, and the
# programs. Included last, when all targets are there.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

install(TARGETS kvshare EXPORT kvshareTargets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/libkvshare/include/kvshare
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h")
install(TARGETS agentd kvctl RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})

set(KVS_PACKAGE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/kvshare)
install(EXPORT kvshareTargets NAMESPACE kvshare:: DESTINATION ${KVS_PACKAGE_DIR})
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/kvshareConfig.cmake.in
  ${PROJECT_BINARY_DIR}/kvshareConfig.cmake INSTALL_DESTINATION ${KVS_PACKAGE_DIR})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/kvshareConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/kvshareConfig.cmake ${PROJECT_BINARY_DIR}/kvshareConfigVersion.cmake
  DESTINATION ${KVS_PACKAGE_DIR})

file(RELATIVE_PATH KVS_PC_TO_PREFIX /p/${CMAKE_INSTALL_LIBDIR}/pkgconfig /p)
configure_file(${PROJECT_SOURCE_DIR}/cmake/kvshare.pc.in ${PROJECT_BINARY_DIR}/kvshare.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/kvshare.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
