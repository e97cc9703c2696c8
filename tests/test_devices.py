"""The machine's memories: made-up machines in a directory, this very machine, and real children on it."""

from __future__ import annotations

import inspect
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
import trio
import trio.testing
from children import PATIENCE, python, read_until, running

from trioswap import devices
from trioswap.devices import Machine, Roots, nvidia, wait_returned

MIB = 2**20
GIB = 2**30

MEMINFO = """MemTotal:       {total} kB
MemFree:         1000000 kB
MemAvailable:   {available} kB
Mapped:         {mapped} kB
Shmem:          {shmem} kB
HugePages_Total:       0
"""


class Tree:
    """A made-up machine below a directory: 64 GiB of memory, 60 of them available, no GPU."""

    def __init__(self, path):
        self.path = path
        self.roots = Roots(*(path / name for name in ("proc", "sys", "dev", "cgroup")))
        self.memory()
        self.namespace("pid:[4026531836]")

    def write(self, name, content=""):
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")

    def link(self, name, target):
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).unlink(missing_ok=True)
        (self.path / name).symlink_to(target)

    def memory(self, total=64, available=60, mapped=0, shmem=0):
        sizes = {"total": total, "available": available, "mapped": mapped, "shmem": shmem}
        self.write("proc/meminfo", MEMINFO.format(**{key: size * 2**20 for key, size in sizes.items()}))

    def namespace(self, name):
        self.link("proc/self/ns/pid", name)

    def process(self, pid, *, anon=0, file=0, shmem=0):
        sizes = {"RssAnon": anon, "RssFile": file, "RssShmem": shmem}
        lines = [f"{key}:\t{size * 2**10:>8} kB" for key, size in sizes.items()]
        self.write(f"proc/{pid}/status", "\n".join(["Name:\tserver", "VmRSS:\t 1 kB", *lines]))

    def descriptor(self, pid, number, fdinfo, opened="renderD128"):
        self.link(f"proc/{pid}/fd/{number}", self.roots.dev / "dri" / opened)
        self.write(f"proc/{pid}/fdinfo/{number}", fdinfo)

    def gpu(self, minor, address, vendor, **files):
        """A GPU on PCI with its render node, and *files* in its directory in /sys."""
        device = self.path / "sys/devices/pci0000:00" / address
        for name, content in {"vendor": vendor, **files}.items():
            self.write(device / name, content)
        self.link(f"sys/class/drm/renderD{minor}/device", device)
        self.write(f"dev/dri/renderD{minor}")
        return device

    def amd(self, minor, address, *, vram, gtt=32, used=0, **files):
        sizes = {"vram_total": vram, "vram_used": used, "gtt_total": gtt}
        return self.gpu(
            minor, address, "0x1002", **{f"mem_info_{key}": size * GIB for key, size in sizes.items()}, **files
        )

    def apu(self, minor, address, **sizes):
        device = self.amd(minor, address, **sizes)
        self.write(device / "hwmon/hwmon3/in0_label", "vddgfx")
        self.write(device / "hwmon/hwmon3/in1_label", "vddnb")

    def compute_node(self, number, gpu, minor):
        node = f"sys/class/kfd/kfd/topology/nodes/{number}"
        self.write(f"{node}/gpu_id", gpu)
        self.write(f"{node}/properties", f"cpu_cores_count 0\ndrm_render_minor {minor}\nlocation_id 768")

    def machine(self, nvml=None):
        machine = Machine(self.roots, nvml)
        machine.discover()
        return machine


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def names(machine):
    return [device.name for device in machine.devices]


# ---- the host --------------------------------------------------------------------------


def test_without_gpus_there_is_ram(tree):
    """A plain machine has its memory, measures it, and nothing is hidden."""
    machine = tree.machine()

    (ram,) = machine.devices
    assert (ram.name, ram.kind, ram.total, ram.measurable, ram.environment) == ("ram", "host", 64 * GIB, True, {})
    assert machine.free() == {"ram": 60 * GIB}
    assert not machine.unmeasured


def test_without_proc_nothing_is_known(tmp_path):
    """Elsewhere (macOS) there are no devices, and the machine says that it cannot measure."""
    machine = Machine(Roots(*[tmp_path] * 4), None)

    assert machine.discover() == ()
    assert machine.unmeasured
    assert machine.free() == {}


def test_mapped_weights_are_not_free(tree):
    """The kernel calls page cache available; what is mapped from files is in use, shared memory was never available."""
    tree.memory(available=50, mapped=22, shmem=2)

    assert tree.machine().free() == {"ram": 30 * GIB}


def test_free_is_never_negative(tree):
    """More mapped than available leaves nothing."""
    tree.memory(available=5, mapped=22)

    assert tree.machine().free() == {"ram": 0}


def test_memory_that_cannot_be_read_is_not_none_free(tree):
    """For want of descriptors, say: whoever took it for 0 would put idle models out."""
    machine = tree.machine()
    (machine.roots.proc / "meminfo").unlink()

    assert machine.free() == {}


def test_the_tightest_cgroup_counts(tree):
    """Version 2: the lowest limit on the way up is the memory there is; its cache is free unless mapped."""
    tree.write("proc/self/cgroup", "0::/user.slice/daemon.service")
    tree.write("cgroup/user.slice/memory.max", 16 * GIB)
    tree.write("cgroup/user.slice/memory.current", 9 * GIB)
    stat = {"anon": 3 * GIB, "active_file": 2 * GIB, "inactive_file": 3 * GIB, "file_mapped": 2 * GIB, "shmem": GIB}
    tree.write("cgroup/user.slice/memory.stat", "\n".join(f"{key} {size}" for key, size in stat.items()))
    tree.write("cgroup/user.slice/daemon.service/memory.max", "max")
    machine = tree.machine()

    assert machine.devices[0].total == 16 * GIB
    assert machine.free() == {"ram": (16 - 9 + 5 - 1) * GIB}


def test_a_wide_cgroup_changes_nothing(tree):
    """A limit above what the machine has is none."""
    tree.write("proc/self/cgroup", "0::/")
    tree.write("cgroup/memory.max", 128 * GIB)
    tree.write("cgroup/memory.current", 1 * GIB)
    machine = tree.machine()

    assert machine.devices[0].total == 64 * GIB
    assert machine.free() == {"ram": 60 * GIB}


def test_cgroup_version_1_in_a_container(tree):
    """The path named is the host's; the top of the mount is the container's own group."""
    tree.write("proc/self/cgroup", "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/")
    tree.write("cgroup/memory/memory.limit_in_bytes", 8 * GIB)
    tree.write("cgroup/memory/memory.usage_in_bytes", 5 * GIB)
    tree.write("cgroup/memory/memory.stat", f"active_file 7\ntotal_active_file {GIB}\ntotal_mapped_file 0")
    machine = tree.machine()

    assert machine.devices[0].total == 8 * GIB
    assert machine.free() == {"ram": 4 * GIB}


def test_broken_files_tell_nothing(tree):
    """Garbage where the kernel's files should be limits nothing and raises nothing."""
    for name in ("proc/self/cgroup", "proc/7/status", "cgroup/memory.max", "cgroup/dmem.capacity"):
        tree.write(name, "\xff:garbage\n12:\n:::")
    tree.gpu(128, "0000:03:00.0", "0x1002", mem_info_vram_total="-1", unique_id="?")
    machine = tree.machine()

    assert machine.free() == {"ram": 60 * GIB}
    assert machine.used_by([7]) == {"ram": 0}
    assert machine.unmeasured


def test_a_family_counts_what_it_shares_once(tree):
    """Private pages add up; mapped files and shared memory are mostly the same ones in each process."""
    tree.process(7, anon=3, file=20, shmem=1)
    tree.process(8, anon=2, file=5, shmem=4)

    assert tree.machine().used_by([7, 8]) == {"ram": (3 + 2 + 20 + 4) * MIB}


def test_who_is_gone_uses_nothing(tree):
    """A vanished process, and a zombie, which has no memory lines, count as nothing."""
    tree.process(7, anon=3)
    tree.write("proc/8/status", "Name:\tserver\nState:\tZ (zombie)")

    assert tree.machine().used_by([7, 8, 9]) == {"ram": 3 * MIB}
    assert tree.machine().used_by([]) == {"ram": 0}


# ---- NVIDIA ----------------------------------------------------------------------------


def fake_nvml(*gpus):
    """A stand-in for `pynvml` with the names that we use; `test_the_fake_is_like_the_real_one` compares them."""
    nvml = ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    class NVMLLibraryMismatchError(Exception):
        pass

    for name in ("NotSupported", "FunctionNotFound", "GpuIsLost", "LibRmVersionMismatch"):
        setattr(nvml, f"NVMLError_{name}", type(f"NVMLError_{name}", (NVMLError,), {}))

    def answer(handle, key):
        if isinstance(gpus[handle][key], type):
            raise gpus[handle][key]
        return gpus[handle][key]

    nvml.NVMLError, nvml.NVMLLibraryMismatchError = NVMLError, NVMLLibraryMismatchError
    nvml.NVML_DEVICE_MIG_ENABLE = 1
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetCount = lambda: len(gpus)
    nvml.nvmlDeviceGetHandleByIndex = lambda index: index
    nvml.nvmlDeviceGetPciInfo = lambda handle: SimpleNamespace(busId=answer(handle, "bus"))
    nvml.nvmlDeviceGetUUID = lambda handle: answer(handle, "uuid")
    nvml.nvmlDeviceGetMigMode = lambda device: answer(device, "mig")
    nvml.nvmlDeviceGetMemoryInfo = lambda handle, version=None: answer(handle, "memory")
    nvml.nvmlDeviceGetComputeRunningProcesses = lambda handle: answer(handle, "computing")
    nvml.nvmlDeviceGetGraphicsRunningProcesses = lambda handle: answer(handle, "drawing")
    # What a lost GPU or an old driver raises is put into the fields by the tests.
    nvml.gpus = gpus
    return nvml


def gpu(bus, total=24, free=20, computing=(), drawing=(), mig=(0, 0)):
    def processes(used):
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in used]

    return {
        "bus": f"00000000:{bus:02X}:00.0",
        "uuid": f"GPU-{bus}",
        "memory": SimpleNamespace(total=total * GIB, free=free * GIB),
        "computing": processes(computing),
        "drawing": processes(drawing),
        "mig": list(mig),
    }


def test_nvidias_go_by_bus(tree):
    """The first on the bus is gpu0, whatever NVML's order; a child sees it by its unique id."""
    machine = tree.machine(fake_nvml(gpu(0x41, total=48), gpu(0x01, total=24)))

    assert names(machine) == ["gpu0", "gpu1", "ram"]
    first, second, _ = machine.devices
    assert (first.kind, first.total, first.measurable) == ("nvidia", 24 * GIB, True)
    assert first.environment == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "GPU-1"}
    assert (second.total, second.environment["CUDA_VISIBLE_DEVICES"]) == (48 * GIB, "GPU-65")
    assert not machine.unmeasured


def test_nvidia_use_by_process(tree):
    """Ours count, others' do not; who computes and draws counts once; nobody is 0."""
    tree.process(7, anon=1)
    busy = gpu(1, free=11, computing=[(7, 5 * GIB), (8, 2 * GIB), (99, GIB)], drawing=[(7, 5 * GIB)])
    machine = tree.machine(fake_nvml(busy, gpu(2, free=23)))

    assert machine.free() == {"gpu0": 11 * GIB, "gpu1": 23 * GIB, "ram": 60 * GIB}
    assert machine.used_by([7, 8]) == {"gpu0": 7 * GIB, "gpu1": 0, "ram": MIB}


def test_a_lost_nvidia_is_missing_from_the_answers(tree):
    """It fell off the bus later: the others go on being measured."""
    nvml = fake_nvml(gpu(1), gpu(2, free=23))
    machine = tree.machine(nvml)
    nvml.gpus[0].update(dict.fromkeys(("memory", "computing", "drawing"), nvml.NVMLError_GpuIsLost))

    assert machine.free() == {"gpu1": 23 * GIB, "ram": 60 * GIB}
    assert machine.used_by([7]) == {"gpu1": 0, "ram": 0}


def test_an_nvidia_lost_from_the_start_is_hidden(tree):
    """One that answers nothing is no device, and the machine is not fully measured."""
    nvml = fake_nvml(gpu(1), gpu(2))
    nvml.gpus[0]["memory"] = nvml.NVMLError_GpuIsLost
    machine = tree.machine(nvml)

    assert names(machine) == ["gpu0", "ram"]
    assert machine.devices[0].environment["CUDA_VISIBLE_DEVICES"] == "GPU-2"
    assert machine.unmeasured


@pytest.mark.parametrize(
    ("entry", "unmeasured"),
    [("nvidia0", True), ("dxg", True), ("nvidiactl", False), ("nvidia-uvm", False), ("0", False)],
)
def test_an_nvidia_without_its_library_is_hidden(tree, entry, unmeasured):
    """The device file of a GPU alone says that there is one; those of the driver alone do not."""
    tree.write(f"dev/{entry}")
    machine = tree.machine()

    assert names(machine) == ["ram"]
    assert machine.unmeasured is unmeasured


def test_an_nvidia_under_another_driver_is_hidden(tree):
    """Under nouveau there is a render node, but nobody tells of its memory."""
    tree.gpu(128, "0000:01:00.0", "0x10de")

    assert tree.machine().unmeasured


@pytest.mark.parametrize("error", ["NVMLError_LibRmVersionMismatch", "NVMLLibraryMismatchError"])
def test_a_library_that_does_not_fit_is_none(monkeypatch, error):
    """A driver that was updated under us is the same as no library."""
    nvml = fake_nvml()

    def fail():
        raise getattr(nvml, error)

    nvml.nvmlInit = fail
    monkeypatch.setitem(sys.modules, "pynvml", nvml)

    assert nvidia.load() is None


def test_the_library_is_optional(monkeypatch):
    """Without the package there is no library; with it, it comes initialised."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvidia.load() is None

    nvml, calls = fake_nvml(), []
    nvml.nvmlInit = lambda: calls.append("init")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert nvidia.load() is nvml
    assert calls == ["init"]


def test_a_driver_too_old_to_list_processes(tree):
    """Memory is told, use by process is not: missing, not 0."""
    nvml = fake_nvml(gpu(1))
    nvml.gpus[0]["computing"] = nvml.NVMLLibraryMismatchError
    machine = tree.machine(nvml)

    assert machine.free() == {"gpu0": 20 * GIB, "ram": 60 * GIB}
    assert machine.used_by([7]) == {"ram": 0}


def test_an_old_library(tree):
    """One without an error of its own for that, too."""
    nvml = fake_nvml(gpu(1))
    del nvml.NVMLLibraryMismatchError
    nvml.gpus[0]["computing"] = nvml.NVMLError_FunctionNotFound

    assert tree.machine(nvml).used_by([7]) == {"ram": 0}


def test_a_driver_that_does_not_say_how_much(tree):
    """A process of ours without a size makes the device's answer missing; others' do not matter."""
    machine = tree.machine(fake_nvml(gpu(1, computing=[(7, None), (8, GIB)])))

    assert machine.used_by([7, 8]) == {"ram": 0}
    assert machine.used_by([8]) == {"gpu0": GIB, "ram": 0}


def test_inside_a_pid_namespace_nvidia_processes_are_not_told(tree):
    """NVML's numbers are the host's: another process's here, so they are not used."""
    tree.namespace("pid:[4026532001]")
    machine = tree.machine(fake_nvml(gpu(1, computing=[(7, GIB)])))

    assert not machine.devices[0].measurable
    assert machine.unmeasured
    assert machine.free() == {"gpu0": 20 * GIB, "ram": 60 * GIB}
    assert machine.used_by([7]) == {"ram": 0}


def test_a_partitioned_nvidia_is_hidden(tree):
    """In MIG mode it is several GPUs; one without that mode, or with a driver from before it, is one."""
    nvml = fake_nvml(gpu(1, mig=(1, 1)), gpu(2), gpu(3))
    nvml.gpus[1]["mig"] = nvml.NVMLError_NotSupported
    nvml.gpus[2]["mig"] = nvml.NVMLError_FunctionNotFound
    machine = tree.machine(nvml)

    assert [device.environment.get("CUDA_VISIBLE_DEVICES") for device in machine.devices] == ["GPU-2", "GPU-3", None]
    assert machine.unmeasured


def test_an_nvidia_in_host_memory_uses_ram(tree):
    """GB10 and its like have no memory of their own: no device, their use is added to ram, nothing is hidden."""
    nvml = fake_nvml(gpu(1, computing=[(7, 29 * GIB)]), gpu(2, computing=[(7, GIB)]))
    for each in nvml.gpus:
        each["memory"] = nvml.NVMLError_NotSupported
    tree.write("dev/nvidia0")
    tree.process(7, anon=5)
    machine = tree.machine(nvml)

    assert names(machine) == ["ram"]
    assert not machine.unmeasured
    assert machine.free() == {"ram": 60 * GIB}
    assert machine.used_by([7]) == {"ram": 30 * GIB + 5 * MIB}

    tree.namespace("pid:[4026532001]")
    assert tree.machine(nvml).unmeasured


def test_the_fake_is_like_the_real_one():
    """Every name, parameter and field that the fake has exists in nvidia-ml-py."""
    real = pytest.importorskip("pynvml", reason="nvidia-ml-py (extra nvidia) is not installed")
    fake = fake_nvml(gpu(1))

    for name in set(vars(fake)) - set(vars(ModuleType("x"))) - {"gpus"}:
        ours, theirs = getattr(fake, name), getattr(real, name)
        if isinstance(ours, type):
            assert issubclass(theirs, real.NVMLError) == issubclass(ours, fake.NVMLError), name
        elif callable(ours):
            assert list(inspect.signature(theirs).parameters) == list(inspect.signature(ours).parameters), name
        else:
            assert theirs == ours, name
    assert {"pid", "usedGpuMemory"} <= fields(real.c_nvmlProcessInfo_t)
    assert {"busId"} <= fields(real.nvmlPciInfo_t)
    assert {"total", "free"} <= fields(real.c_nvmlMemory_t)


def fields(structure):
    return {name for name, *_ in structure._fields_}


# ---- AMD -------------------------------------------------------------------------------

AMD_OLD = """pos:\t0
pasid:\t32784
drm-driver:\tamdgpu
drm-pdev:\t{address}
drm-client-id:\t{client}
drm-memory-vram:\t{vram} KiB
drm-memory-gtt: \t{gtt} KiB
drm-memory-cpu: \t0 KiB
drm-engine-gfx:\t107322799 ns
"""
AMD_NEW = AMD_OLD + "drm-total-vram:\t9000 MiB\ndrm-shared-vram:\t8000 MiB\ndrm-resident-vram:\t{vram} KiB\n"
CARD = "0000:03:00.0"


def amd_client(client, vram, gtt=0, *, address=CARD, layout=AMD_OLD):
    """fdinfo of one connection; sizes in MiB."""
    return layout.format(address=address, client=client, vram=vram * 1024, gtt=gtt * 1024)


def test_an_amd_card(tree):
    """Its size and what is taken stand in /sys; ROCm finds it by its unique id."""
    tree.amd(128, CARD, vram=24, used=3, unique_id="7c6f2b1a00e1d2c3")
    machine = tree.machine()

    card, _ = machine.devices
    assert (card.name, card.kind, card.total, card.measurable) == ("gpu0", "amd", 24 * GIB, True)
    assert card.environment == {"ROCR_VISIBLE_DEVICES": "GPU-7c6f2b1a00e1d2c3", "HIP_VISIBLE_DEVICES": "0"}
    assert machine.free() == {"gpu0": 21 * GIB, "ram": 60 * GIB}
    assert not machine.unmeasured


def test_amd_cards_without_an_id_go_by_compute_node(tree):
    """ROCm counts its nodes, not the PCI bus, and processors are no GPUs; a card that it does not know gets nothing."""
    tree.amd(128, "0000:03:00.0", vram=16, unique_id="0000000000000000")
    tree.amd(129, "0000:0c:00.0", vram=8)
    tree.amd(130, "0000:0d:00.0", vram=4)
    tree.compute_node(0, 0, 0)
    tree.compute_node(2, 222, 129)
    tree.compute_node(10, 111, 128)
    first, second, third, _ = tree.machine().devices

    assert (first.total, first.environment["ROCR_VISIBLE_DEVICES"]) == (16 * GIB, "1")
    assert (second.total, second.environment["ROCR_VISIBLE_DEVICES"]) == (8 * GIB, "0")
    assert (third.total, third.environment) == (4 * GIB, {})


@pytest.mark.parametrize("layout", [AMD_OLD, AMD_NEW])
def test_amd_use_by_process(tree, layout):
    """Connections add up, one that is shared counts once, host memory held through the card is ram."""
    tree.amd(128, CARD, vram=24)
    tree.amd(129, "0000:0c:00.0", vram=24)
    tree.process(7, anon=10)
    tree.process(8)
    for pid, number in ((7, 5), (7, 6), (8, 5)):  # duplicated, and inherited by the other process
        tree.descriptor(pid, number, amd_client(31, 500, 40, layout=layout))
    tree.descriptor(8, 6, amd_client(32, 7, layout=layout))
    tree.descriptor(8, 7, amd_client(31, 9, address="0000:0c:00.0", layout=layout), "renderD129")
    tree.link("proc/8/fd/1", "/dev/null")
    tree.write("proc/8/fdinfo/1", amd_client(99, 1000))
    tree.link("proc/8/fd/9", tree.roots.dev / "dri/renderD128")  # closed between the two looks
    machine = tree.machine()

    assert machine.used_by([7, 8]) == {"gpu0": 507 * MIB, "gpu1": 9 * MIB, "ram": 50 * MIB}
    assert machine.used_by([9]) == {"gpu0": 0, "gpu1": 0, "ram": 0}


def test_rocm_knows_of_more(tree):
    """The larger of both sources counts; inside a pid namespace the second one's numbers are somebody else's."""
    tree.amd(128, CARD, vram=24)
    tree.compute_node(1, 51545, 128)
    tree.descriptor(7, 5, amd_client(31, 500))
    tree.write("sys/class/kfd/kfd/proc/7/vram_51545", 600 * MIB)
    tree.write("sys/class/kfd/kfd/proc/8/vram_51545", 100 * MIB)
    assert tree.machine().used_by([7, 8]) == {"gpu0": 700 * MIB, "ram": 0}

    tree.write("sys/class/kfd/kfd/proc/7/vram_51545", 0)
    assert tree.machine().used_by([7, 8]) == {"gpu0": 500 * MIB, "ram": 0}

    tree.namespace("pid:[4026532001]")
    tree.write("sys/class/kfd/kfd/proc/7/vram_51545", 600 * MIB)
    assert tree.machine().used_by([7, 8]) == {"gpu0": 500 * MIB, "ram": 0}


def test_an_amd_card_smaller_than_what_it_may_take_of_the_host(tree):
    """That alone does not make it integrated: the driver lets it take half of the host's memory."""
    tree.amd(128, CARD, vram=8, gtt=32)

    assert names(tree.machine()) == ["gpu0", "ram"]


def test_an_apu_works_in_ram(tree):
    """No device and nothing hidden; what it holds counts as ram, in the piece that is set aside as well."""
    tree.apu(128, "0000:c5:00.0", vram=1, gtt=30)
    tree.process(7, anon=100)
    tree.descriptor(7, 5, amd_client(3, 200, 24000, address="0000:c5:00.0"))
    machine = tree.machine()

    assert names(machine) == ["ram"]
    assert not machine.unmeasured
    assert machine.free() == {"ram": 60 * GIB}
    assert machine.used_by([7]) == {"ram": (100 + 200 + 24000) * MIB}


def test_an_apu_with_most_memory_set_aside(tree):
    """What was set aside for it at boot is its own, and larger than what it could take otherwise."""
    tree.apu(128, "0000:c5:00.0", vram=96, gtt=16)

    card, _ = tree.machine().devices
    assert (card.name, card.total) == ("gpu0", 96 * GIB)


def test_an_amd_card_that_tells_nothing_is_hidden(tree):
    """Under the old driver radeon there is a render node and no memory information."""
    tree.gpu(128, CARD, "0x1002")

    assert names(tree.machine()) == ["ram"]
    assert tree.machine().unmeasured


def test_a_compute_driver_without_a_card_is_hidden(tree):
    """A container that was given /dev/kfd but no render node can compute where we cannot look."""
    tree.write("dev/kfd")
    assert tree.machine().unmeasured

    tree.amd(128, CARD, vram=24)
    assert not tree.machine().unmeasured


def test_a_card_that_was_not_given_to_us_is_not_there(tree):
    """/sys shows all GPUs even in a container; without its node in /dev/dri it cannot be used."""
    tree.amd(128, CARD, vram=24)
    (tree.path / "dev/dri/renderD128").unlink()

    assert names(tree.machine()) == ["ram"]
    assert not tree.machine().unmeasured


def test_a_card_whose_free_memory_is_not_told(tree):
    """It is missing from the answer, and the rest is there."""
    device = tree.amd(128, CARD, vram=24)
    machine = tree.machine()
    (device / "mem_info_vram_used").unlink()

    assert machine.free() == {"ram": 60 * GIB}


# ---- Intel -----------------------------------------------------------------------------

XE = """drm-driver:\txe
drm-client-id:\t3
drm-pdev:\t0000:03:00.0
drm-total-system:\t0
drm-resident-system:\t0
drm-total-gtt:\t192 KiB
drm-resident-gtt:\t192 KiB
drm-total-vram0:\t23992 KiB
drm-shared-vram0:\t16 MiB
drm-resident-vram0:\t20 MiB
drm-cycles-rcs:\t28257900
drm-total-cycles-rcs:\t7655183225
"""
I915 = """drm-driver:\ti915
drm-client-id:\t3
drm-pdev:\t0000:00:02.0
drm-total-system0:\t90 MiB
drm-resident-system0:\t81920 KiB
drm-resident-stolen-system0:\t1048576
"""


def test_an_integrated_intel_works_in_ram(tree):
    """No device, nothing hidden; what it holds is ram."""
    tree.gpu(128, "0000:00:02.0", "0x8086")
    tree.process(7, anon=1)
    tree.descriptor(7, 5, I915)
    machine = tree.machine()

    assert names(machine) == ["ram"]
    assert not machine.unmeasured
    assert machine.used_by([7]) == {"ram": 81 * MIB}


def test_an_intel_card_that_tells_nothing_is_hidden(tree):
    """Under i915 or an older kernel no file says how large its memory is; nobody takes it for the host's."""
    tree.gpu(128, "0000:03:00.0", "0x8086")
    tree.gpu(129, "0000:00:02.0", "0x8086")
    tree.descriptor(7, 5, XE)
    machine = tree.machine()

    assert names(machine) == ["ram"]
    assert machine.unmeasured
    assert machine.used_by([7]) == {"ram": 192 * 2**10}


def test_an_intel_card_under_xe(tree):
    """The cgroup's root tells its size; the mask counts the integrated one before it."""
    tree.gpu(128, "0000:03:00.0", "0x8086")
    tree.gpu(129, "0000:00:02.0", "0x8086")
    tree.write("cgroup/dmem.capacity", f"drm/0000:03:00.0/vram0 {12 * GIB}\ndrm/0000:13:00.0/vram0 5")
    tree.descriptor(7, 5, XE)
    machine = tree.machine()

    card, _ = machine.devices
    assert (card.name, card.kind, card.total, card.measurable) == ("gpu0", "intel", 12 * GIB, True)
    assert card.environment == {
        "ZE_ENABLE_PCI_ID_DEVICE_ORDER": "1",
        "ZE_AFFINITY_MASK": "1",
        "ONEAPI_DEVICE_SELECTOR": "level_zero:0",
    }
    assert not machine.unmeasured
    assert machine.used_by([7]) == {"gpu0": 20 * MIB, "ram": 192 * 2**10}
    assert machine.free() == {"ram": 60 * GIB}  # how much is taken is told by newer kernels only

    tree.write("cgroup/dmem.current", f"drm/0000:03:00.0/vram0 {2 * GIB}")
    assert machine.free() == {"gpu0": 10 * GIB, "ram": 60 * GIB}


def test_vendors_are_numbered_one_after_the_other(tree):
    """NVIDIA's first, then AMD's, then Intel's, wherever they are on the bus."""
    tree.gpu(128, "0000:01:00.0", "0x8086")
    tree.write("cgroup/dmem.capacity", f"drm/0000:01:00.0/vram0 {12 * GIB}")
    tree.amd(129, "0000:02:00.0", vram=24)
    tree.gpu(130, "0000:03:00.0", "0x10de")
    machine = tree.machine(fake_nvml(gpu(3)))

    kinds = [(device.name, device.kind) for device in machine.devices]
    assert kinds == [("gpu0", "nvidia"), ("gpu1", "amd"), ("gpu2", "intel"), ("ram", "host")]
    assert not machine.unmeasured


# ---- this machine ----------------------------------------------------------------------

HELD = 64 * MIB
# What a bare Python holds, generously, and how much the kernel's counters may lag.
PYTHON = 48 * MIB
LAG = 8 * MIB
PRIVATE = f"import signal; held = bytearray(b'x') * {HELD}; print('up'); signal.pause()"
MAPPED = f"""
import mmap, signal
file = open({{path!r}}, 'rb')
held = mmap.mmap(file.fileno(), {HELD}, access=mmap.ACCESS_READ)
touched = held[::mmap.PAGESIZE]
print('up')
signal.pause()
"""
SHARED = f"""
import mmap, os, signal
held = mmap.mmap(-1, {HELD})
held.write(b'x' * {HELD})
touched, told = os.pipe()
if child := os.fork():
    os.read(touched, 1)
    print(child, 'up')
else:
    pages = held[::mmap.PAGESIZE]
    os.write(told, b'x')
signal.pause()
"""

needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is no /proc")


@needs_proc
def test_this_machine_can_be_asked():
    """Whatever it has: memory is the last device, and what is free fits into what there is."""
    machine = Machine()
    devices = machine.discover()

    assert devices[-1].name == "ram"
    total = {device.name: device.total for device in devices}
    assert all(0 <= size <= total[name] for name, size in machine.free().items())
    assert machine.free()["ram"] > 0


@needs_proc
async def test_private_memory_of_a_real_child():
    """What a child has allocated and touched is measured, and little else."""
    async with running(python(PRIVATE), until="up") as child:
        used = Machine().used_by([child.pid])["ram"]

    assert HELD - LAG <= used <= HELD + PYTHON


@needs_proc
async def test_mapped_file_of_a_real_child(tmp_path):
    """Weights that a child reads through a mapping count as its memory."""
    weights = tmp_path / "weights"
    weights.write_bytes(b"x" * HELD)
    async with running(python(MAPPED.format(path=str(weights))), until="up") as child:
        used = Machine().used_by([child.pid])["ram"]

    assert HELD - LAG <= used <= HELD + PYTHON


@needs_proc
async def test_shared_memory_of_a_real_family():
    """Memory that two processes share is there once."""
    async with running(python(SHARED)) as parent:
        child = int((await read_until(parent, "up")).split()[0])
        machine = Machine()
        alone = [machine.used_by([pid])["ram"] for pid in (parent.pid, child)]
        family = machine.used_by([parent.pid, child])["ram"]

    assert min(alone) >= HELD - LAG
    assert sum(alone) - family >= HELD - 2 * LAG


# ---- looks beside others ----------------------------------------------------------------


async def test_a_driver_that_hangs_holds_up_nobody(tree, monkeypatch, caplog):
    """One look is given up and told, none is begun beside it, and that it answers again is told as well."""
    nvml, asked, answers = fake_nvml(gpu(1)), [], threading.Event()
    machine = tree.machine(nvml)

    def memory(handle, version=None):
        asked.append(handle)
        answers.wait(PATIENCE)
        return nvml.gpus[handle]["memory"]

    nvml.nvmlDeviceGetMemoryInfo = memory
    with trio.fail_after(PATIENCE):
        try:
            monkeypatch.setattr(devices, "LOOK_WAIT", 0.05)
            assert await machine.in_time(machine.free) is None
            monkeypatch.setattr(devices, "LOOK_WAIT", PATIENCE)
            assert await machine.in_time(machine.free) is None
            assert (asked, machine.late) == ([0], True)
        finally:
            answers.set()
        while (found := await machine.in_time(machine.free)) is None:
            pass

    assert (found["gpu0"], machine.late) == (20 * GIB, False)
    assert [record.getMessage() for record in caplog.records] == [
        "no answer about the memory within 0.05 s: what was known last counts",
        "the memory can be looked at again",
    ]


async def test_without_a_thread_nobody_looks(tree, monkeypatch, caplog):
    """The next look may have one."""
    machine = tree.machine()

    async def no_thread(*_, **__):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(trio.to_thread, "run_sync", no_thread)
    assert await machine.in_time(machine.free) is None
    assert "can't start new thread" in caplog.text
    monkeypatch.undo()
    assert (await machine.in_time(machine.free)).keys() == {"ram"}


async def test_who_waits_for_others_to_look_calls_no_driver_late(tree, monkeypatch, caplog, autojump_clock):
    """Each of these looks has its answer after a second, and the last one begins after five."""
    machine = tree.machine()

    async def a_second(look, *, limiter, **_):
        async with limiter:
            await trio.sleep(1)
            return look()

    found = []

    async def look():
        found.append(await machine.in_time(machine.free))

    monkeypatch.setattr(trio.to_thread, "run_sync", a_second)
    async with trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(look)
    assert [set(free) for free in found] == 6 * [{"ram"}]
    assert not machine.late
    assert caplog.messages == []


# ---- the memory of an ended server -----------------------------------------------------


class Gauge:
    """Free memory that changes at given times: a list of (seconds, free), latest last."""

    def __init__(self, *history):
        self.history = history
        self.start = trio.current_time()
        self.looks = []

    def free(self):
        now = round(trio.current_time() - self.start, 6)
        self.looks.append(now)
        return [free for since, free in self.history if since <= now][-1]

    async def in_time(self, look):
        return look()


async def returned(gauge, before, expected):
    """`wait_returned`, which ends in all but one of these tests."""
    with trio.fail_after(60):
        await wait_returned(gauge, before, lambda: expected)


async def test_memory_that_is_back_is_not_waited_for(autojump_clock):
    """One look, a checkpoint, and no sleep."""
    gauge = Gauge((0, {"gpu0": 20 * GIB}))

    with trio.testing.assert_checkpoints():
        await returned(gauge, {"gpu0": 8 * GIB}, {"gpu0": 12 * GIB})

    assert gauge.looks == [0]


async def test_looks_become_rarer(autojump_clock):
    """Soon after the end often, later four times a second."""
    gauge = Gauge((0, {"gpu0": 8 * GIB}), (0.9, {"gpu0": 20 * GIB}))

    await returned(gauge, {"gpu0": 8 * GIB}, {"gpu0": 12 * GIB})

    assert gauge.looks == pytest.approx([0, 0.02, 0.06, 0.14, 0.3, 0.55, 0.8, 1.05])


@pytest.mark.parametrize(
    ("expected", "enough"), [(20 * GIB, 18 * GIB), (GIB, GIB - 256 * MIB), (100 * MIB, 100 * MIB - 256 * MIB)]
)
async def test_a_little_may_be_missing(autojump_clock, expected, enough):
    """A tenth of what was expected, or 256 MiB if that is more."""
    before = 4 * GIB
    gauge = Gauge((0, {"gpu0": before + enough - 1}), (1, {"gpu0": before + enough}))

    await returned(gauge, {"gpu0": before}, {"gpu0": expected})

    assert gauge.looks[-1] == pytest.approx(1.05)


async def test_every_gpu_is_waited_for(autojump_clock):
    """The last one decides."""
    full, back = 2 * GIB, 12 * GIB
    gauge = Gauge(
        (0, {"gpu0": full, "gpu1": full}), (0.1, {"gpu0": back, "gpu1": full}), (0.5, {"gpu0": back, "gpu1": back})
    )

    await returned(gauge, {"gpu0": full, "gpu1": full}, {"gpu0": 10 * GIB, "gpu1": 10 * GIB})

    assert gauge.looks[-1] == pytest.approx(0.55)


async def test_ram_is_never_waited_for(autojump_clock):
    """Nor a device of which nothing was told before."""
    gauge = Gauge((0, {"gpu0": 0, "ram": 0}))

    await returned(gauge, {"ram": GIB}, {"ram": 30 * GIB, "gpu0": 10 * GIB})

    assert gauge.looks == []


async def test_a_gpu_lost_meanwhile_is_not_waited_for(autojump_clock):
    """What does not answer cannot come back."""
    gauge = Gauge((0, {"gpu0": 0}), (0.1, {}))

    await returned(gauge, {"gpu0": 0}, {"gpu0": 10 * GIB})

    assert gauge.looks[-1] == pytest.approx(0.14)


async def test_memory_that_somebody_else_took_is_waited_for_until_cancelled(autojump_clock):
    """The bound is the caller's."""
    gauge = Gauge((0, {"gpu0": 0}))

    with trio.move_on_after(5) as scope:
        await wait_returned(gauge, {"gpu0": 0}, lambda: {"gpu0": 10 * GIB})

    assert scope.cancelled_caught
