"""Unpack the wheels of packages that this Python cannot import: neither pip nor a network is needed.

    python bench/gpu_site.py WHEELS SITE        # then PYTHONPATH=SITE

It imports nothing of ours, which may not be importable yet. Says what is still missing, and ends with status 1 then.
"""

import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

# What `bench.gpu` imports: the module's name by the package's. All but DeepSpeed's are light; torch must be there.
PACKAGES = {
    "deepspeed": "deepspeed",
    "hjson": "hjson",
    "pydantic": "pydantic",
    "pydantic-core": "pydantic_core",
    "annotated-types": "annotated_types",
    "typing-inspection": "typing_inspection",
    "typing-extensions": "typing_extensions",
    "einops": "einops",
    "msgpack": "msgpack",
    "ninja": "ninja",
    "packaging": "packaging",
    "py-cpuinfo": "cpuinfo",
    "psutil": "psutil",
    "tqdm": "tqdm",
    "timm": "timm",
    "safetensors": "safetensors",
    "pyyaml": "yaml",
}
NEEDED = (
    "numpy",
    "PIL",
    "torchvision",
    "huggingface_hub",
)  # not carried: too many or too large, and there where timm is


def main(wheels: Path, site: Path) -> int:
    """Unpack what is missing from `wheels` to `site`; 0, or 1 if something is missing there too."""
    absent = [name for name, module in PACKAGES.items() if find_spec(module) is None]
    site.mkdir(parents=True, exist_ok=True)
    lacking = [name for name in NEEDED if find_spec(name) is None]
    for name in absent:
        found = sorted(wheels.glob(f"{name.replace('-', '_')}-*.whl"))
        if found:
            with zipfile.ZipFile(found[-1]) as wheel:
                wheel.extractall(site)
        else:
            lacking.append(name)
    unpacked = [name for name in absent if name not in lacking]
    if unpacked:
        print(f"gpu_site: unpacked {', '.join(unpacked)}", file=sys.stderr)
    if lacking:
        print(f"gpu_site: missing {', '.join(lacking)}; bench/gpu_pack.sh packs what it can", file=sys.stderr)
    return int(bool(lacking))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
