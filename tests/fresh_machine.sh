#!/usr/bin/env bash
# Runs the README's two commands in a bare Debian 12 made by debootstrap, on a clean clone of HEAD. Needs root, or sudo.
# Usage: tests/fresh_machine.sh [WORK_DIR] [run|test ...]   (default: a new folder under /tmp, both commands; the folder is kept when they fail)
#
# What this machine says about registries (apt sources, pip and cargo settings, proxies, certificates) is passed on into the bare one.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

suite=${FRESH_SUITE:-bookworm}
[ "$(id -u)" = 0 ] || exec sudo --preserve-env "$0" "$@"
work=${1:-$(mktemp -d /tmp/mlxlm-fresh.XXXXXX)}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- run test
root=$work/root
mkdir -p "$work"

# The first http(s) address among apt's sources, in either of their formats.
mirror() {
  cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources 2>/dev/null |
    awk '/^URIs:/ { print $2; exit } /^deb / { for (i = 2; i <= NF; i++) if ($i ~ /^https?:/) { print $i; exit } }'
}

make_base() {
  if [ ! -x "$work/base/usr/bin/apt-get" ]; then
    has debootstrap || { apt-get update -qq && apt-get install -y -qq debootstrap; }
    say "Making a bare $suite in $work/base"
    rm -rf "$work/base"
    quiet "$work/debootstrap.log" debootstrap --variant=minbase "$suite" "$work/base" "$(mirror)"
  fi
  rm -rf --one-file-system "$root"
  cp -a "$work/base" "$root"
}

copy_in() {
  local path
  for path in "$@"; do
    if [ -e "$path" ]; then
      mkdir -p "$root$(dirname "$path")"
      rm -rf "${root:?}$path"
      cp -aL "$path" "$root$path"
    fi
  done
}

copy_machine_settings() {
  local setting
  # Sources that are switched on and whose keys the bare system has; apt hooks of desktop packages stay out.
  rm -f "$root"/etc/apt/sources.list
  mkdir -p "$root/etc/apt/sources.list.d" "$root/root/.cargo"
  for setting in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
    if [ -f "$setting" ] && grep -q debian "$setting" && ! grep -Eq 'Signed-By: *(/etc|/usr/local)|signed-by=/etc' "$setting"; then
      copy_in "$setting"
    fi
  done
  for setting in /etc/apt/apt.conf /etc/apt/apt.conf.d/*; do
    if grep -Eqi '^ *Acquire::' "$setting" 2>/dev/null; then copy_in "$setting"; fi
  done
  copy_in /etc/resolv.conf /etc/hosts /etc/ssl/certs /usr/share/ca-certificates /usr/local/share/ca-certificates /etc/pip.conf
  if [ -d "${PIP_FIND_LINKS:-}" ]; then copy_in "$PIP_FIND_LINKS"; fi
  for setting in "$HOME/.cargo/config.toml" "$HOME/.config/pip/pip.conf" "$HOME/.pip/pip.conf"; do
    if [ -f "$setting" ]; then
      install -D "$setting" "$root/root${setting#"$HOME"}"
    fi
  done
}

mounted=no
unmount() {
  if [ "$mounted" = yes ]; then umount "$root/proc"; fi
  mounted=no
}
trap unmount EXIT

enter() {
  local keep=() name
  while IFS= read -r name; do
    case "$name" in
      PIP_* | CARGO_HTTP_* | CARGO_NET_* | CARGO_REGISTR* | *_proxy | *_PROXY | SSL_CERT_* | CURL_CA_BUNDLE | REQUESTS_CA_BUNDLE | GIT_SSL_CAINFO)
        keep+=("$name=${!name}")
        ;;
    esac
  done < <(compgen -e)
  env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 "${keep[@]}" chroot "$root" \
    /bin/bash -c "cd /mlx-lm.cpp && $1"
}

make_base
copy_machine_settings
git clone -q "file://$PWD" "$root/mlx-lm.cpp"
mount -t proc proc "$root/proc"
mounted=yes

for which in "$@"; do
  case "$which" in
    run) command='./dev run generate --prompt "Why is the sky blue?" --max-tokens 32' ;;
    test) command='./dev test' ;;
    *) die "wanted run or test, got: $which" ;;
  esac
  say "fresh \$ $command"
  SECONDS=0
  enter "$command"
  say "fresh: took $SECONDS s"
done
unmount
say "fresh: both worked, at $(git rev-parse --short HEAD)"
if [ "${FRESH_KEEP:-no}" = no ]; then rm -rf --one-file-system "$root"; fi
