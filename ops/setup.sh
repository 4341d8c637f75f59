# Sourced by other scripts: creates or reuses .venv in the checkout and installs the package with the extra $1.
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "cmscale needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Set PYTHON=/path/to/python3.11" >&2
  exit 2
}
unset PYTHONDONTWRITEBYTECODE # with it every process would compile all that it imports
[ -x .venv/bin/python ] || "$python" -m venv .venv
# The stamp records what is installed, so that a second call needs no package index.
stamp="$1 $(sha256sum pyproject.toml | cut -c1-64)"
installed=.venv/installed
touch "$installed"
if ! grep -qxF "$stamp" "$installed"; then
  echo "installing cmscale[$1] into .venv"
  # pip first: the version that comes with Python 3.11 takes minutes to resolve these packages, a current one seconds.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[$1]"
  # pip would compile all modules, most of which are never imported: more than half of an installation's time. Python
  # compiles what it imports, the first time; here, beside what comes next, before processes do so at once.
  .venv/bin/python -W ignore -c 'import boto3, cmscale.cli.app, deepspeed, lpips, streaming, torchvision, wandb, webdataset' \
    >.venv/first_import.log 2>&1 </dev/null &
  echo "$stamp" >>"$installed"
fi
export PATH="$PWD/.venv/bin:$PATH"
