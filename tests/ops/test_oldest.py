"""The check with the oldest packages takes them from pyproject.toml."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import oldest_libraries
import oldest_versions
import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    assert oldest_versions.oldest(["torch>=2.9.0", "deepspeed>=0.19.8,<0.20"]) == ["torch==2.9.0", "deepspeed==0.19.8"]
    with pytest.raises(ValueError, match="webdataset: has no lower bound"):
        oldest_versions.oldest(["webdataset"])


def test_every_dependency_has_a_lower_bound() -> None:
    command = [sys.executable, str(CHECKOUT / "ops/oldest_versions.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    names = [line.split("==")[0] for line in printed]
    assert {"torch", "torchvision", "xformers", "deepspeed", "numpy", "pydantic"} <= set(names)
    assert len(set(names)) == len(names)


def test_the_list_has_the_lower_bounds() -> None:
    """`bash ops/oldest.sh --lock` writes it anew."""
    entries = [line.split("==") for line in (CHECKOUT / "ops" / "oldest.txt").read_text().split()]
    found = {name.lower().replace("_", "-"): version for name, version in entries}
    for bound in oldest_versions.bounds():
        name, version = bound.split("==")
        there = found[name.lower().replace("_", "-")]
        assert there.removesuffix(".0").removesuffix(".0") == version.removesuffix(".0").removesuffix(".0"), name


def test_the_list_leaves_out_the_large_cuda_libraries() -> None:
    names = ["torch", "nvidia-cublas-cu12", "nvidia-cuda-runtime-cu12", "attrs"]
    report = {"install": [{"metadata": {"name": name, "version": "1.0"}} for name in names]}
    assert oldest_versions.locked(report) == ["attrs==1.0", "nvidia-cuda-runtime-cu12==1.0", "torch==1.0"]


@pytest.mark.skipif(not (shutil.which("cc") and shutil.which("readelf")), reason="needs cc and readelf")
def test_a_library_loads_with_an_empty_one_in_place_of_what_it_needs(tmp_path: Path) -> None:
    def compiled(name: str, code: str, *more: str) -> Path:
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(tmp_path / name), f"-Wl,-soname,{name}"]
        subprocess.run([*command, f"-L{tmp_path}", *more], input=code, text=True, check=True)
        return tmp_path / name

    (tmp_path / "map").write_text("TWELVE { global: cublasCall; cublasTaken; };")
    versioned = "void cublasCall(void) {} void cublasTaken(void) {}"
    cublas = compiled("libcublas.so.12", versioned, f"-Wl,--version-script={tmp_path}/map")
    nccl = compiled("libnccl.so.2", "void ncclTaken(void) {}")
    code = "void cublasCall(void); void cublasTaken(void); void ncclTaken(void);"
    code += "void (*taken[])(void) = {cublasTaken, ncclTaken}; void call(void) { cublasCall(); }"
    code += "int five(void) { return 5; }"
    needed = ("-l:libcublas.so.12", "-l:libnccl.so.2", f"-Wl,-rpath,{tmp_path}")
    library = compiled("libours.so", code, *needed)
    cublas.unlink()
    nccl.unlink()
    with pytest.raises(OSError, match="cannot open shared object file"):
        ctypes.CDLL(str(library))
    assert oldest_libraries.complete(tmp_path, [tmp_path / "libc.so.6"]) == ["libcublas.so.12", "libnccl.so.2"]
    load = f"import ctypes; library = ctypes.CDLL('{library}'); print(library.five(), flush=True); library.call()"
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=False)
    assert done.stdout == "5\n"
    assert done.returncode < 0  # a function of an empty library was called


@pytest.mark.parametrize("arguments", [("--keep",), ("--keep", "a", "b"), ("--lock", "x"), ("--whatever",)])
def test_a_mistake_is_one_line_with_status_2(arguments: tuple[str, ...]) -> None:
    command = ["bash", str(CHECKOUT / "ops/oldest.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: bash ops/oldest.sh [--keep DIR] | --lock\n")


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    command = ["bash", str(CHECKOUT / "ops/oldest.sh"), "--keep", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in {2, 75}  # 75 without Python 3.11
    assert (tmp_path / "mine").read_text() == "precious"
    assert not (tmp_path / "pyvenv.cfg").exists()
