"""What is installed and what the machine has, its disk, and whether two processes reach each other."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afresh.cores import cpu_count
from afresh.errors import UserError
from train.machine.findings import Absent, Finding, attempt

if TYPE_CHECKING:
    import torch

NEEDED = ("torch", "diffusers", "transformers", "accelerate", "datasets", "faiss-cpu", "webdataset")
OPTIONAL = ("peft", "xformers", "bitsandbytes", "tensorboard", "open_clip_torch", "timm", "sentence-transformers")
_DISK_BYTES = 256 << 20


def versions() -> Iterator[Finding]:
    """Python, the system and the packages that the jobs rest on."""
    import torch

    yield Finding("versions", "python", "works", f"{platform.python_version()} on {platform.platform()}")
    for name in (*NEEDED, *OPTIONAL):
        yield attempt("versions", name, lambda name=name: _version(name))  # type: ignore[misc]
    yield Finding("versions", "torch's build", "works", f"CUDA {torch.version.cuda}, HIP {torch.version.hip}")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        if name in OPTIONAL:
            raise Absent("not installed") from None
        raise UserError("not installed, and needed: install afresh again") from None


def devices() -> Iterator[Finding]:
    """Cores, memory, and each accelerator that torch sees."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 if hasattr(os, "sysconf") else 0.0
    cores: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = ", ".join(name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if cores.get(name))
    detail = f"{cpu_count()} cores, {memory:.0f} GB of memory, {fast or 'no vectors known'}"
    yield Finding("devices", "cpu", "works", detail)
    if not torch.accelerator.is_available():
        yield Finding("devices", "accelerator", "not here", "torch sees none")
    for number in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(number)
        detail = f"{of.name}, {of.total_memory / 1e9:.0f} GB, capability {of.major}.{of.minor}"
        yield Finding("devices", f"cuda:{number}", "works", detail)


def disk(folder: str) -> Iterator[Finding]:
    """How fast a file is written there, and how fast the carried shards are read and decoded."""
    yield attempt("disk", f"write {_DISK_BYTES >> 20} MiB", lambda: _written(folder))
    yield attempt("disk", "read shards", _read)


def _written(folder: str) -> Finding:
    data = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder or None) as file:
        start = time.perf_counter()
        for _ in range(_DISK_BYTES >> 20):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - start
    rate = f"{_DISK_BYTES / seconds / 1e6:.0f} MB/s, down to the disk"
    return Finding("disk", f"write {_DISK_BYTES >> 20} MiB", "works", rate, seconds)


def _read() -> Finding:
    from curate.reading.images import decode_image
    from curate.reading.samples import Sample, read_samples
    from curate.sample_set import sample_shards

    start = time.perf_counter()
    samples = [one for url in sample_shards() for one in read_samples(url) if isinstance(one, Sample)]
    read = time.perf_counter() - start
    start = time.perf_counter()
    for sample in samples[:200]:
        decode_image(sample.image)
    decoded = (time.perf_counter() - start) / len(samples[:200])
    size = sum(Path(url).stat().st_size for url in sample_shards()) / 1e6
    detail = f"{len(samples) / read:.0f} samples/s ({size / read:.0f} MB/s), {1 / decoded:.0f} images decoded/s a core"
    return Finding("disk", "read shards", "works", detail, read)


def processes() -> Iterator[Finding]:
    """Two processes on the CPU, and one on each GPU, that add up numbers of each other."""
    import torch

    yield attempt("processes", "gloo", lambda: _exchanged("gloo", 2))
    several = torch.cuda.device_count()
    yield attempt("processes", "nccl", lambda: _exchanged("nccl", several))


def _exchanged(backend: str, world: int) -> Finding:
    import torch

    if backend == "nccl" and (not world or not torch.distributed.is_nccl_available()):
        raise Absent("no GPU that NCCL could join")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (backend, world, folder), nprocs=world)
        seconds = float(Path(folder, "seconds").read_text())
    detail = f"{world} processes, {64 / seconds / 1e3:.2f} GB/s" if world > 1 else "one process: nothing to exchange"
    return Finding("processes", backend, "works", detail, seconds)


def _process(rank: int, backend: str, world: int, folder: str) -> None:
    """One of the processes; raises where the sum is wrong."""
    import torch
    from torch import distributed

    device: Any = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    numbers = torch.full((16 << 20,), float(rank + 1), device=device)  # 64 MB
    distributed.all_reduce(numbers)
    expected = world * (world + 1) / 2
    if not bool((numbers == expected).all()):
        raise RuntimeError(f"the sum over {world} processes is {numbers[0].item()}, not {expected}")
    distributed.barrier()
    start = time.perf_counter()
    distributed.all_reduce(numbers)
    _wait(device)
    if rank == 0:
        Path(folder, "seconds").write_text(str(time.perf_counter() - start))
    os._exit(0)  # a thread of the group that still holds the numbers could hang its end, or the interpreter's


def _wait(device: torch.device) -> None:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)
