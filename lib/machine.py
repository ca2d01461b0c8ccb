"""The machine: device, precision, threads, seeds, and its part of env.json. Imports torch only in functions."""

import ctypes
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path

from lib.cli import BadInput, one_line

PACKAGES = ("torch", "torchvision", "fastai", "albumentations", "grad-cam", "matplotlib", "numpy", "pillow")
CPU_MODEL = ("cpu family", "model", "CPU implementer", "CPU part")  # lines of /proc/cpuinfo, on x86 and on Arm
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def prepare(config):
    """Sets up memory, device, threads and seeds as `config` asks. Raises BadInput.

    Returns what each `auto` became: torch.device, precision (float32, bf16 or fp16), threads of torch on the CPU.
    """
    keep_memory()
    device = pick_device(config)
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)  # else CUDA itself would open, and use, the first card
    seed_everything(config.seed)
    return device, pick_precision(config, device), set_threads(config)


def launched():
    """Whether torchrun started this process as one of several. The variable RANK alone does not prove it."""
    return all(name in os.environ for name in TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1


def processes_here():
    """How many processes of this run are on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else 1


def cores():
    """How many cores this process may use, by its affinity and the quota of its control group; often not all."""
    from joblib import cpu_count

    return cpu_count()


def useful_workers(device, batch):
    """How many processes should load batches of `batch` bytes: none for a CPU, whose cores have enough to do."""
    if device.type == "cpu" or sys.platform == "win32":  # Windows would send all pixels to each process
        return 0
    workers = min(8, max(1, cores() // processes_here()))
    shared = Path("/dev/shm")  # where two batches a worker wait; a container often has 64 MB
    return max(0, min(workers, (shutil.disk_usage(shared).free // batch - 2) // 2)) if shared.is_dir() else workers


@contextmanager
def signals_held():
    """Ctrl-C and SIGTERM wait until the block ends. In a process that is started inside, they wait from its start."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def leave_signals():
    """Makes a loader process ignore Ctrl-C, and every SIGTERM that its parent, the run, did not send.

    A signal to all processes is meant for the run: it finishes what is under way, and saves.
    """

    def end():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end, daemon=True).start()


def busy_seconds():
    """(seconds that other programs have worked on the cores that this process may use, the number of these cores).

    None if not on Linux. Programs with a lower priority (`nice`) give way to this one, so their work does not count.
    """
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        ours = os.sched_getaffinity(0)
    except (OSError, AttributeError):
        return None
    counted = (0, 1, 2, 5, 6) if os.nice(0) > 0 else (0, 2, 5, 6)  # user, nice, system, irq, softirq
    cpus = [line.split() for line in lines if line[:3] == "cpu" and line[3:4].isdigit()]
    ticks = sum(int(cpu[1 + i]) for cpu in cpus if int(cpu[0][3:]) in ours for i in counted)
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time(), len(ours)


def commit():
    """The commit of this code, with '+' if tracked files differ from it; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git on this machine
        return None


def cpu_facts():
    """What /proc/cpuinfo says of the first processor; {} if there is no such file."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().split("\n\n")[0].splitlines() if file.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def device_name(device):
    """The name of the chip behind a torch.device."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_facts().get("model name") or platform.processor() or platform.machine()


def environment():
    """Versions, commit and machine, for env.json."""
    import torch

    cpu = cpu_facts()
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "commit": commit(),
        "platform": platform.platform(),
        "cpu": device_name(torch.device("cpu")),
        # on virtual machines, `cpu` may be equal for two chips, one of them twice as fast
        "cpu_model": ", ".join(f"{key} {cpu[key]}" for key in CPU_MODEL if key in cpu),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count() * torch.cuda.is_available())],
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def fault(device):
    """Why torch cannot compute on the device of this name, in one line; None if it can."""
    import torch

    try:
        torch.ones(1, device=device).add(1).item()
    except (RuntimeError, AssertionError) as e:
        return one_line(e)[:300]


def pick_device(config):
    """`--device` as a torch.device; auto is the rank's own GPU, or the best device there is. Raises BadInput.

    auto does without a GPU that is too old for torch, or whose driver is. A GPU that is busy, or full, is an error.
    """
    import torch

    name, processes, gpus = config.device, processes_here(), torch.cuda.device_count()
    one_each = name == "cuda" or (name == "auto" and gpus > 0)
    if one_each and processes <= gpus:
        name = f"cuda:{os.environ['LOCAL_RANK'] if launched() else 0}"
    elif processes > 1 and (one_each or name.startswith("cuda")):  # on every rank, so that none waits
        n = gpus if one_each else 1
        remedy = f"start {n} (torchrun --nproc-per-node {n}), or pass --device cpu" if n else "pass --device cpu"
        raise BadInput(f"--device {name}: {n} GPUs for {processes} processes on this machine; {remedy}")
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() and not launched() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise BadInput(f"--device: must be auto, cpu, cuda, cuda:1 or mps, not {name!r}")
    why = fault(name)
    if why and config.device == "auto" and not launched() and not any(word in why for word in ("memory", "busy")):
        print(f"warning: {name} is not used ({why})", file=sys.stderr)
        name = "cpu"
    elif why:
        raise BadInput(f"--device: {name} cannot be used ({why}); pass another one, or --device cpu")
    return torch.device(name)


def pick_precision(config, device):
    """`--precision`; auto is bf16 if the chip computes in it, else float32. Raises BadInput for fp16 without CUDA."""
    import torch

    if config.precision == "fp16" and device.type != "cuda":
        remedy = "resume where there is one" if config.resume else "pass bf16, float32 or auto"
        raise BadInput(f"--precision: fp16 needs a CUDA device; {remedy}")
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    chip = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if any(chip.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else "float32"


@cache
def torchs_threads():
    """The number of threads that torch has by itself. It is asked once, before a run changes it."""
    import torch

    return torch.get_num_threads()


def set_threads(config):
    """Sets torch's CPU threads to `--threads` and returns their number. A run repeats only with the same number.

    auto: one for each core that the process may use. torch itself ignores the quota; torchrun gives it one thread.
    """
    import torch

    auto = max(1, cores() // processes_here()) if launched() else min(torchs_threads(), cores())
    torch.set_num_threads(auto if config.threads == "auto" else config.threads)
    return torch.get_num_threads()


def keep_memory():
    """Puts large tensors into huge pages, and lets the C library (glibc) keep freed memory, if the system allows it.

    Otherwise the system clears the same pages in every step, and the chip looks up the address of every 4 kB of a
    tensor. Call it before the first tensor is made: torch reads the variable then (c10/core/impl/alloc_cpu.cpp).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: a large tensor gets no separate block of memory
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: no memory is given back to the system


def seed_everything(seed):
    """Seeds torch's generators, for weights and dropout, and limits cuDNN to algorithms that repeat to the bit.

    Order and augmentation need no seed: they are functions of (seed, epoch, image).
    """
    import torch

    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def peak_rss_bytes():
    """The largest memory that this process has held; None on Windows, where Python cannot ask for it."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
