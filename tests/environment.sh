# Sourced by quickstart.sh and tests/run.sh: use the active virtual environment or .venv, made here
# if need be, and install the given requirements where they changed since the last time.
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -e .venv/bin/activate ] || python3 -m venv .venv
    source .venv/bin/activate
fi
python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: this needs Python 3.11 or newer: remove .venv, activate an environment of python3.11" \
        "(python3.11 -m venv .venv), then run it again" >&2
    exit 2
}
stamp="$VIRTUAL_ENV/.installed-$1"
if ! cat requirements.txt "$1" | cmp -s - "$stamp"; then
    echo "installing $1 into $VIRTUAL_ENV"
    python -m pip install -q -r "$1"
    cat requirements.txt "$1" > "$stamp"
fi
# As runtime/openmp.py, for what is not a program of this repository: pytest and its workers.
if [ -z "${OMP_WAIT_POLICY:-}${GOMP_SPINCOUNT:-}" ]; then
    export GOMP_SPINCOUNT=10000
fi
