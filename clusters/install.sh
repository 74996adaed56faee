#!/usr/bin/env bash
# Makes the same Python environment on every host of a cluster, in ~/raylit-env: the exact versions of constraints.txt,
# and the raylit of the clone that it lies in. The cluster files run it on each host; by hand it is
#
#     bash clusters/install.sh [EXTRAS]        EXTRAS: of pyproject.toml, with commas: examples,aws
#
#     bash clusters/install.sh --as-it-is [EXTRAS]   takes the ~/raylit-env that is there: of an image that has it all
#
# Settings, all optional, as environment variables:
#     RAYLIT_STORAGE   where runs are kept; exported to every shell, job and worker of the host
#     RAYLIT_PYTHON    the interpreter. Ray wants the same one, to the patch release, on all hosts of a cluster
#     TORCH_INDEX      the wheel index torch comes from (pytorch.org names them); the CPU build saves some GB a host
#
# A second run with nothing changed takes no time. One that broke off is done again.
set -euo pipefail

python=${RAYLIT_PYTHON:-python3.12} # what Ubuntu 24.04 has, and the images that the cluster files name
as_it_is=
if [ "${1:-}" = --as-it-is ]; then
  as_it_is=yes
  shift
fi
extras=${1:-}
source_of=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) # a clone, or the part of it that the launcher sent
place=$HOME/raylit-env

say() { echo "install.sh: $*" >&2; }
fail() { say "$@"; exit 1; }

# By running it: pyenv's shims are there for Pythons that are not.
"$python" -c '' >/dev/null 2>&1 \
  || fail "$python was not found on $(hostname), or does not run; install it, or name another: RAYLIT_PYTHON=python3.11"
for file in constraints.txt pyproject.toml README.md LICENSE raylit; do
  test -e "$source_of/$file" || fail "$source_of/$file is missing: run it from a clone of raylit, or send that too"
done
for extra in ${extras//,/ }; do # pip would only warn of one that is not there, and go on without
  grep -q "^$extra = \[" "$source_of/pyproject.toml" || fail "raylit has no extra '$extra'; see pyproject.toml"
done

# Sourced by every shell, so that `ray up`, `ray submit`, jobs and workers all find this environment, and the storage.
mkdir -p "$HOME/.raylit"
{
  printf 'export PATH=%q:"$PATH"\n' "$place/bin"
  test -z "${RAYLIT_STORAGE:-}" || printf 'export RAYLIT_STORAGE=%q\n' "$RAYLIT_STORAGE"
} >"$HOME/.raylit/env.sh.new"
mv "$HOME/.raylit/env.sh.new" "$HOME/.raylit/env.sh"
# In front: on Debian and Ubuntu .bashrc ends at its first lines where the shell is not interactive.
touch "$HOME/.bashrc"
if ! grep -q '\.raylit/env\.sh' "$HOME/.bashrc"; then
  { echo 'test ! -f "$HOME/.raylit/env.sh" || . "$HOME/.raylit/env.sh"'; cat "$HOME/.bashrc"; } >"$HOME/.bashrc.new"
  mv "$HOME/.bashrc.new" "$HOME/.bashrc"
fi

# What the environment is made of; the stamp is written last.
made_of=$({ "$python" -VV; echo "$extras ${TORCH_INDEX:-}"; cd "$source_of"
            find constraints.txt pyproject.toml raylit -name '*.pyc' -prune -o -type f -print0 | sort -z | xargs -0 cat
          } | sha256sum)
test -z "$as_it_is" || echo "$made_of" >"$place/.made-of"
if [ "$(cat "$place/.made-of" 2>/dev/null)" = "$made_of" ]; then
  say "$place is up to date"
  exit 0
fi

# Debian and Ubuntu keep venv in a package of its own. A fresh cloud host may still hold the package lock for minutes.
if ! "$python" -m ensurepip --version >/dev/null 2>&1; then
  package=$(basename "$python")-venv
  say "installing $package"
  as_root() { if [ "$(id -u)" = 0 ]; then env "$@"; else sudo -n "$@"; fi; } # -n: nobody is there to type a password
  apt=(DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600)
  { as_root "${apt[@]}" update && as_root "${apt[@]}" install -y "$package"; } \
    || fail "$package is missing on $(hostname), and could not be installed; run there: sudo apt-get install -y $package"
fi

say "installing into $place; the first time this takes some minutes"
"$python" -m venv --clear "$place"
pip() { "$place/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
torch=$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' "$source_of/constraints.txt")
pip install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"
pip install -c "$source_of/constraints.txt" hatchling editables
# Built here with the pinned tools: pip's own build environment would take their newest versions.
pip install -c "$source_of/constraints.txt" --no-build-isolation "$source_of${extras:+[$extras]}"
echo "$made_of" >"$place/.made-of"
"$place/bin/python" - <<'EOF' >&2
import platform, ray, torch, raylit
versions = {"Ray": ray, "torch": torch, "raylit": raylit}
print("install.sh: Python", platform.python_version(), *(f"{name} {it.__version__}" for name, it in versions.items()))
EOF
