# Sourced by quickstart.sh, test.sh and .ci/run: finds Python, makes .venv, installs medaug when something changed.
# Defines: repository, venv, prepare_venv [EXTRA ...]

repository="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$repository/.venv"

_is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

_find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" >/dev/null && _is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    echo "medaug needs Python 3.11 or newer and found none on the PATH; install one (Debian: apt install python3 python3-venv) and run this again." >&2
    return 2
}

_make_venv() {
    local python
    python="$(_find_python)" || return
    echo "Making $venv with $("$python" --version) ..." >&2
    if ! "$python" -m venv --clear "$venv" >&2; then
        echo "Python could not make a virtual environment; install its venv module (Debian: apt install python3-venv) and run this again." >&2
        return 2
    fi
}

# The state that an installation belongs to: metadata, place of the checkout, Python.
_state() {
    "$venv/bin/python" - "$repository" <<'PYTHON'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(f"{root} {sys.version}".encode())
for name in ("setup.cfg", "pyproject.toml"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
PYTHON
}

# prepare_venv [EXTRA ...]: afterwards "$venv/bin/python" can import medaug with those extras.
prepare_venv() {
    local extras stamp state
    if ! _is_new_enough "$venv/bin/python"; then
        _make_venv || return
    fi
    extras="$(IFS=,; echo "$*")"
    stamp="$venv/.medaug-installed${extras:+-${extras//,/-}}"
    state="$(_state)" || return
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ]; then
        return
    fi
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        _make_venv || return
    fi
    echo "Installing medaug${extras:+[$extras]} into $venv (a few minutes the first time) ..." >&2
    if ! "$venv/bin/python" -m pip install -e "$repository${extras:+[$extras]}" >&2; then
        echo "The installation failed, see above; run this again to continue." >&2
        return 5
    fi
    echo "$state" >"$stamp"
}
