"""The machine: device, precision, threads, seeds, and what env.json says of it."""

import ctypes
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path


from lib.cli import BadInput

PACKAGES = ("torch", "torchvision", "fastai", "albumentations", "grad-cam", "matplotlib", "numpy", "pillow")


CPU_MODEL = ("cpu family", "model", "CPU implementer", "CPU part")  # of /proc/cpuinfo, on x86 and on Arm


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched():
    """Whether torchrun started this process as one of several; a stray RANK alone does not say so."""
    return all(name in os.environ for name in TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1


def on_this_machine():
    """How many processes of this run the machine has."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else 1


def commit():
    """The commit of this code, '+' behind it where the tree differs; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        tree = ["status", "--porcelain", "--untracked-files=no", "--", "*.py"]
        dirty = subprocess.run([*git, *tree], capture_output=True, text=True, check=True).stdout
        return head + ("+" if dirty.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_facts():
    """What /proc/cpuinfo says of the first processor, {} where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cpu_name():
    return cpu_facts().get("model name") or platform.processor() or platform.machine()


def environment():
    """Versions, commit and machine, for env.json."""
    import torch

    cpu = cpu_facts()
    return {
        "python": platform.python_version(),
        **{p: version(p) for p in PACKAGES},
        "commit": commit(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        # virtual machines of chips twice as fast have the same name
        "cpu_model": ", ".join(f"{key} {cpu[key]}" for key in CPU_MODEL if key in cpu),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def pick_device(config):
    """`--device` as a torch.device. Raises BadInput where there is no such device."""
    import torch

    if config.device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if launched():  # each rank its own GPU, where there are enough
            local = int(os.environ["LOCAL_RANK"])
            return torch.device("cuda", local) if local < torch.cuda.device_count() else torch.device("cpu")
        return torch.device(kind)
    try:
        device = torch.device(config.device)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise BadInput(f"--device: {config.device!r} is not to be had on this machine; pass auto or cpu") from None


def pick_precision(config, device):
    """`--precision`; auto is bf16 where the chip computes in it, else float32. Raises BadInput for fp16 off CUDA."""
    import torch

    if config.precision == "auto":
        if device.type == "cuda":
            has = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            chip = torch.cpu.get_capabilities()
            has = device.type == "cpu" and (chip.get("avx512_bf16") or chip.get("amx_bf16") or chip.get("bf16"))
        return "bf16" if has else "float32"
    if config.precision == "fp16" and device.type != "cuda":
        raise BadInput("--precision: fp16 needs a CUDA device; pass bf16, float32 or auto")
    return config.precision


def set_threads(config):
    """Sets torch's CPU threads to `--threads` and returns their number; it is part of what makes a run repeatable."""
    import torch

    if config.threads != "auto":
        torch.set_num_threads(config.threads)
    elif launched():  # torchrun would have one thread each
        torch.set_num_threads(max(1, os.cpu_count() // on_this_machine()))
    return torch.get_num_threads()


def keep_memory():
    """Has large tensors in huge pages, and the C library (glibc) keep what freed ones held; both as Linux allows.

    Else the system clears the same pages in every step, and the chip looks up each 4 kB of a tensor. Call it before the
    first tensor is made: then torch reads what it is told (c10/core/impl/alloc_cpu.cpp).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no block of memory of its own for a large tensor
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back


def seed_everything(seed):
    """Seeds torch's generators: weights and dropout. Order and augmentation need no state (`augment`).

    Holds cuDNN to algorithms that repeat themselves to the bit.
    """
    import torch

    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def peak_rss_bytes():
    """The most memory this process has held; None on Windows, which does not say it to Python."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
