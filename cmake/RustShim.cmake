# rust/ -> one static library behind a plain C header (rust/mlxlm_rust.h).
find_program(CARGO NAMES cargo HINTS $ENV{HOME}/.cargo/bin /usr/lib/rust-web/bin REQUIRED)
set(_rust_target ${CMAKE_BINARY_DIR}/rust)
set(_rust_library ${_rust_target}/release/libmlxlm_rust.a)
file(GLOB _rust_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/rust/src/*.rs)
add_custom_command(
  OUTPUT ${_rust_library}
  COMMAND ${CMAKE_COMMAND} -E env CARGO_TARGET_DIR=${_rust_target} ${CARGO} build --release --locked --manifest-path
          ${CMAKE_SOURCE_DIR}/rust/Cargo.toml
  DEPENDS ${_rust_sources} ${CMAKE_SOURCE_DIR}/rust/Cargo.toml ${CMAKE_SOURCE_DIR}/rust/Cargo.lock
  COMMENT "Rust: tokenizers, templates, downloads"
  USES_TERMINAL VERBATIM)
add_custom_target(mlxlm_rust_build DEPENDS ${_rust_library})
add_library(mlxlm_rust INTERFACE)
add_dependencies(mlxlm_rust mlxlm_rust_build)
target_include_directories(mlxlm_rust INTERFACE $<BUILD_INTERFACE:${CMAKE_SOURCE_DIR}/rust>)
target_link_libraries(mlxlm_rust INTERFACE $<BUILD_INTERFACE:${_rust_library}> ${CMAKE_DL_LIBS} Threads::Threads)
if(APPLE)
  target_link_libraries(mlxlm_rust INTERFACE "-framework Security" "-framework CoreFoundation")
endif()
