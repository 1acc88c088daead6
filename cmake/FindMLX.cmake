# MLX::mlx from the wheel of the Python package index, pinned. The wheel's own MLXConfig is not used: it asks for a CUDA toolkit
# to configure, and on macOS for one exact path of Xcode (../docs/decisions has more).
#
#   MLXLM_BACKEND   cpu | cuda | metal   which wheel
#   MLX_ROOT        folder with include/ and lib/; empty = download the wheel into the build folder
set(MLXLM_MLX_VERSION 0.32.4)
if(APPLE)
  set(_mlx_default_backend metal)
else()
  set(_mlx_default_backend cpu)
endif()
set(MLXLM_BACKEND ${_mlx_default_backend} CACHE STRING "MLX library to build against: cpu, cuda or metal")
set_property(CACHE MLXLM_BACKEND PROPERTY STRINGS cpu cuda metal)
set(MLX_ROOT "" CACHE PATH "MLX's folder with include/ and lib/ (empty: download the pinned wheel)")

if(MLXLM_BACKEND STREQUAL "cpu")
  set(_mlx_package mlx-cpu)
elseif(MLXLM_BACKEND STREQUAL "cuda")
  set(_mlx_package mlx-cuda-13)
elseif(MLXLM_BACKEND STREQUAL "metal")
  set(_mlx_package mlx-metal)
else()
  message(FATAL_ERROR "MLXLM_BACKEND: got '${MLXLM_BACKEND}', wanted cpu, cuda or metal")
endif()

set(_mlx_root "${MLX_ROOT}")
if(NOT _mlx_root)
  set(_mlx_wheels ${CMAKE_BINARY_DIR}/_mlx/${_mlx_package}-${MLXLM_MLX_VERSION})
  set(_mlx_root ${_mlx_wheels}/mlx)
  if(NOT EXISTS ${_mlx_wheels}/complete)
    find_package(Python3 REQUIRED COMPONENTS Interpreter)
    message(STATUS "Downloading ${_mlx_package} ${MLXLM_MLX_VERSION} from the Python package index")
    file(REMOVE_RECURSE ${_mlx_wheels})
    file(MAKE_DIRECTORY ${_mlx_wheels})
    execute_process(
      COMMAND ${Python3_EXECUTABLE} -m pip download --quiet --no-deps --only-binary=:all: --dest ${_mlx_wheels}
              ${_mlx_package}==${MLXLM_MLX_VERSION}
      RESULT_VARIABLE _mlx_status ERROR_VARIABLE _mlx_error)
    if(NOT _mlx_status EQUAL 0)
      message(FATAL_ERROR "${_mlx_package}==${MLXLM_MLX_VERSION}: download failed (is there a network? is pip there? ${Python3_EXECUTABLE} -m pip --version)\n${_mlx_error}")
    endif()
    file(GLOB _mlx_wheel ${_mlx_wheels}/*.whl)
    file(ARCHIVE_EXTRACT INPUT ${_mlx_wheel} DESTINATION ${_mlx_wheels})
    file(REMOVE ${_mlx_wheel})
    file(TOUCH ${_mlx_wheels}/complete)
  endif()
endif()
cmake_path(ABSOLUTE_PATH _mlx_root NORMALIZE)

set(MLX_ROOT_USED "${_mlx_root}" CACHE INTERNAL "MLX's folder, given or downloaded")

find_path(MLX_INCLUDE_DIR mlx/mlx.h PATHS ${_mlx_root}/include NO_DEFAULT_PATH NO_CACHE)
find_library(MLX_LIBRARY mlx PATHS ${_mlx_root}/lib NO_DEFAULT_PATH NO_CACHE)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(MLX REQUIRED_VARS MLX_LIBRARY MLX_INCLUDE_DIR)

if(MLX_FOUND AND NOT TARGET MLX::mlx)
  add_library(MLX::mlx SHARED IMPORTED GLOBAL)
  set_target_properties(MLX::mlx PROPERTIES IMPORTED_LOCATION ${MLX_LIBRARY} INTERFACE_COMPILE_FEATURES cxx_std_20)
  target_include_directories(MLX::mlx SYSTEM INTERFACE ${MLX_INCLUDE_DIR})
  set(MLX_LIBRARY_DIR ${_mlx_root}/lib)
  if(APPLE)
    set_property(TARGET MLX::mlx PROPERTY INTERFACE_LINK_LIBRARIES
      "-framework Metal" "-framework Foundation" "-framework QuartzCore" "-framework Accelerate")
  elseif(MLXLM_BACKEND STREQUAL "cuda")
    # Its NVIDIA libraries come from wheels at run time (docs/cuda.md); the linker need not find them.
    set_property(TARGET MLX::mlx APPEND PROPERTY INTERFACE_LINK_OPTIONS "LINKER:--allow-shlib-undefined")
  endif()
endif()
