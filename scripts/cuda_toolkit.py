"""Print, for a shell, where CUDA's compiler is; installed from PyPI where there is none.

The pieces of a toolkit are pinned together: a newer nvvm writes what an older ptxas cannot read.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = "cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]==13.0.*"


def main() -> None:
    """Print assignments of CUDACXX and CUDA_HOME."""
    home = os.environ.get("CUDA_HOME")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).is_file():
        site = next(p for p in sys.path if p.endswith("site-packages"))
        root = Path(site) / "nvidia" / "cu13"
        nvcc = str(root / "bin" / "nvcc")
        if not Path(nvcc).is_file():
            print(f"no nvcc: installing {PACKAGES}", file=sys.stderr)
            command = [sys.executable, "-m", "pip", "install", "-q", PACKAGES]
            subprocess.run(command, check=True, stdout=sys.stderr)
        # What linkers and CMake look for.
        for link, target in (
            (root / "lib64", "lib"),
            (root / "lib/libcudart.so", "libcudart.so.13"),
        ):
            if not link.exists():
                link.symlink_to(target)
        print(f"export CUDA_HOME={root};")
    print(f"export CUDACXX={nvcc};")


if __name__ == "__main__":
    main()
