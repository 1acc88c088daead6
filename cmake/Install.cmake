# cmake --install: bin/mlx-lm, include/mlxlm/, lib/libmlxlm.a (all rooms in one) and lib/libmlxlm_rust.a, MLX's library
# in lib/mlxlm/, and the CMake package mlxlm with the target mlxlm::mlxlm. No MLX header is needed to use it, so none is installed.
include(CMakePackageConfigHelpers)

set(_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/mlxlm)
set(_mlx_install_dir ${CMAKE_INSTALL_LIBDIR}/mlxlm)  # the wheel's own layout below it: mlx/lib/, mlx_cpu.libs/

# The program, and every room in one archive (not the Rust library: ar loses its symbols where LLVM's plugin is installed).
if(APPLE)
  set(_origin @loader_path)
else()
  set(_origin $ORIGIN)
endif()
set_target_properties(mlx-lm PROPERTIES INSTALL_RPATH ${_origin}/../${_mlx_install_dir}/mlx/lib)
install(TARGETS mlx-lm RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(DIRECTORY ${CMAKE_SOURCE_DIR}/include/mlxlm DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})

get_property(_rooms GLOBAL PROPERTY MLXLM_ROOMS)
set(_archives)
foreach(_room IN LISTS _rooms)
  get_target_property(_room_type ${_room} TYPE)
  if(_room_type STREQUAL "STATIC_LIBRARY")
    list(APPEND _archives "$<TARGET_FILE:${_room}>")
  endif()
endforeach()
install(CODE "set(archives \"${_archives}\")
set(merged \"${CMAKE_BINARY_DIR}/libmlxlm.a\")
set(AR \"${CMAKE_AR}\")
include(\"${CMAKE_SOURCE_DIR}/cmake/MergeArchives.cmake\")")
install(FILES ${CMAKE_BINARY_DIR}/libmlxlm.a ${_rust_library} DESTINATION ${CMAKE_INSTALL_LIBDIR})

# MLX's library and what it was packed with.
install(DIRECTORY ${MLX_LIBRARY_DIR}/ DESTINATION ${_mlx_install_dir}/mlx/lib PATTERN "*.a" EXCLUDE)
file(GLOB _mlx_packed ${MLX_ROOT_USED}/../mlx_*.libs)
if(_mlx_packed)
  install(DIRECTORY ${_mlx_packed} DESTINATION ${_mlx_install_dir})
endif()

# The package.
get_filename_component(MLX_LIBRARY_NAME ${MLX_LIBRARY} NAME)
set(MLX_INSTALL_DIR ${_mlx_install_dir}/mlx)
configure_package_config_file(${CMAKE_SOURCE_DIR}/cmake/mlxlmConfig.cmake.in ${CMAKE_BINARY_DIR}/mlxlmConfig.cmake
  INSTALL_DESTINATION ${_package_dir} PATH_VARS CMAKE_INSTALL_INCLUDEDIR CMAKE_INSTALL_LIBDIR MLX_INSTALL_DIR)
write_basic_package_version_file(${CMAKE_BINARY_DIR}/mlxlmConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/mlxlmConfig.cmake ${CMAKE_BINARY_DIR}/mlxlmConfigVersion.cmake DESTINATION ${_package_dir})
install(FILES ${CMAKE_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DATAROOTDIR}/doc/mlxlm)
