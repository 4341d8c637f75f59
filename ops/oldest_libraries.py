"""Gives a PyTorch for CUDA empty libraries in place of those that are not installed, so that it can be imported.

    python ops/oldest_libraries.py SITE_PACKAGES

The CUDA libraries are 3 GB, of which a training on a CPU calls nothing; the loader asks for them and for their symbols
alone. Each function of an empty library ends the process.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

CUDA = re.compile(r"lib((?:cu|nccl|nv)\w*?)(?:_host)?\.so")
"""Names of CUDA's libraries. All their functions begin with the group."""

ENGLISH = os.environ | {"LC_ALL": "C"}


@dataclass
class Wanted:
    """What the libraries of a folder ask for.

    Attributes:
        libraries: The libraries that they need.
        versioned: Of a library and a version of its, the functions.
        bare: Functions that name no library.
    """

    libraries: set[str] = field(default_factory=set)
    versioned: dict[str, dict[str, set[str]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(set)))
    bare: set[str] = field(default_factory=set)


def wanted(paths: Iterable[Path]) -> Wanted:
    """What these shared libraries ask for, by readelf."""
    found = Wanted()
    for path in paths:
        command = ["readelf", "--wide", "--dynamic", "--version-info", "--dyn-syms", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True, env=ENGLISH).stdout
        found.libraries |= set(re.findall(r"\(NEEDED\).*\[(.+)\]", text))
        library, owners = "", {}
        for name, version in re.findall(r"  File: (\S+)|  Name: (\S+)  Flags:", text):
            library = name or library
            if version:
                owners[version] = library
        for function, version in re.findall(r" UND (\w+)(?:@(\S+))?", text):
            if not version:
                found.bare.add(function)
            elif version in owners:
                found.versioned[owners[version]][version].add(function)
    return found


def write(folder: Path, library: str, asked: Wanted) -> None:
    """Compiles a library of functions that end the process."""
    match = CUDA.match(library)
    assert match is not None, library
    versions = asked.versioned.get(library, {})
    functions = {name for name in asked.bare if name.startswith(match[1])}.union(*versions.values())
    code = "".join(f"void {name}(void) {{ __builtin_trap(); }}\n" for name in sorted(functions))
    script = "".join(f"{version} {{ global: {'; '.join(sorted(names))}; }};\n" for version, names in versions.items())
    with tempfile.NamedTemporaryFile("w", suffix=".map") as versions_file:
        versions_file.write(script)
        versions_file.flush()
        command = ["cc", "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(folder / library)]
        command += [f"-Wl,-soname,{library}", *([f"-Wl,--version-script={versions_file.name}"] if script else [])]
        subprocess.run(command, input=code, text=True, check=True)


def complete(libraries: Path, installed: Iterable[Path]) -> list[str]:
    """Writes the CUDA libraries that those in a folder need and that are not installed. Returns their names."""
    paths = [path for path in sorted(libraries.glob("*.so*")) if path.name not in NOT_LOADED]
    asked = wanted(paths)
    there = {path.name for path in [*libraries.iterdir(), *installed]}
    missing = sorted(name for name in asked.libraries - there if CUDA.match(name))
    for name in missing:
        write(libraries, name, asked)
    return missing


NOT_LOADED = ("libtorch_cuda_linalg.so", "libcaffe2_nvrtc.so")  # until a GPU needs them

if __name__ == "__main__":
    site = Path(sys.argv[1])
    print("empty:", *complete(site / "torch" / "lib", site.glob("nvidia/*/lib/*")))
